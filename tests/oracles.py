"""The localisation metrics (Sec. 4.1) as the released code counts them, in full: what faster code is tested against.

Shapes: N images, H W map.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from sklearn import metrics as sk

from glad_core.image_metrics import curve_metrics


def pixel_metrics(maps_NHW: np.ndarray, masks_NHW: np.ndarray, thresholds: int = 200) -> dict[str, float]:
    """P-AUROC, P-AP, P-F1-max over all pixels, and PRO.

    Args:
        masks_NHW: > 0 where anomalous.
        thresholds: number of PRO's thresholds between the smallest and the largest value.
    """
    masks = np.asarray(masks_NHW) > 0
    curves = curve_metrics(np.asarray(maps_NHW).ravel(), masks.ravel().astype(int))
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


def auroc_by_pairs(scores, labels) -> float:
    """The chance that an anomalous one scores above a good one, ties counting half."""
    bad, good = scores[labels == 1][:, None], scores[labels == 0][None]
    return float(((bad > good) + 0.5 * (bad == good)).mean())


def f1_and_ap_by_counting(scores, labels) -> tuple[float, float]:
    best, precision_area, recall_before = 0.0, 0.0, 0.0
    for level in np.unique(scores)[::-1]:
        called = scores >= level
        hits = (called & (labels == 1)).sum()
        precision, recall = hits / called.sum(), hits / (labels == 1).sum()
        precision_area += (recall - recall_before) * precision
        recall_before = recall
        best = max(best, 2 * hits / (called.sum() + (labels == 1).sum()))
    return float(best), float(precision_area)
