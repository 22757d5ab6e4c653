"""Detection and localisation metrics (Sec. 4.1), as the released code counts them.

Shapes: N images, H W map.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.stats import rankdata
from sklearn import metrics as sk


def image_metrics(scores_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """AUROC, AP and F1-max of image scores, min-max normalised over the set as in the released code.

    Args:
        scores_N: any real scores.
        labels_N: 1 anomalous, 0 good.
    """
    scores = np.asarray(scores_N, dtype=np.float64)
    spread = scores.max() - scores.min()
    return _curves((scores - scores.min()) / (spread if spread > 0 else 1.0), np.asarray(labels_N).astype(int))


def auroc_of_resamples(scores: np.ndarray, good_RG: np.ndarray, bad_RA: np.ndarray) -> np.ndarray:
    """Image AUROC of every resample, [R]: the Mann-Whitney statistic of each line's good and anomalous images.

    Args:
        scores: of all images; ``good_RG`` and ``bad_RA`` are indices into them.
    """
    goods, bads = good_RG.shape[1], bad_RA.shape[1]
    ranks = rankdata(scores[np.concatenate([good_RG, bad_RA], axis=1)], axis=1)[:, goods:]
    return (ranks.sum(axis=1) - bads * (bads + 1) / 2) / (goods * bads)


def pixel_metrics(maps_NHW: np.ndarray, masks_NHW: np.ndarray, thresholds: int = 200) -> dict[str, float]:
    """P-AUROC, P-AP, P-F1-max over all pixels, and PRO.

    Args:
        masks_NHW: > 0 where anomalous.
        thresholds: number of PRO's thresholds between the smallest and the largest value.
    """
    masks = np.asarray(masks_NHW) > 0
    curves = _curves(np.asarray(maps_NHW).ravel(), masks.ravel().astype(int))
    return {**{f"P-{name}": value for name, value in curves.items()}, "PRO": pro(maps_NHW, masks, thresholds)}


def pro(maps_NHW: np.ndarray, masks_NHW: np.ndarray, thresholds: int = 200, limit: float = 0.3) -> float:
    """Per-region overlap: the area below mean overlap of the regions against the false positive rate, up to ``limit``.

    Regions are 8-connected. Thresholds run evenly from the smallest value to below the largest; a pixel counts when
    its value is above. The rates kept are below ``limit`` and divided by the largest of them; no end point is added.

    Returns:
        0 to 1; 0 where no threshold is left (constant maps too), NaN without a region or without a normal pixel.
    """
    maps, masks = np.asarray(maps_NHW), np.asarray(masks_NHW) > 0
    regions = []  # the sorted values of each region
    for image, mask in zip(maps, masks, strict=True):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [np.sort(image[labelled == number]) for number in range(1, count + 1)]
    normal = np.sort(maps[~masks])
    if not regions or not len(normal):
        return float("nan")
    low, high = maps.min(), maps.max()
    if low == high:
        return 0.0
    levels = np.arange(low, high, (high - low) / thresholds)
    overlap = np.mean([_share_above(values, levels) for values in regions], axis=0)
    rate = _share_above(normal, levels)
    kept = rate < limit
    if not kept.any() or rate[kept].max() == 0:
        return 0.0
    return float(sk.auc(rate[kept] / rate[kept].max(), overlap[kept]))


def _share_above(sorted_values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return 1 - np.searchsorted(sorted_values, levels, side="right") / len(sorted_values)


def _curves(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * precision * recall / (precision + recall)
    return {
        "AUROC": float(sk.roc_auc_score(labels, scores)),
        "AP": float(sk.average_precision_score(labels, scores)),
        "F1max": float(f1[np.isfinite(f1)].max()),
    }
