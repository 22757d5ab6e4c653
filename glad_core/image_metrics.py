"""Metrics of image scores (Sec. 4.1) as the released code counts them, and the statistics that compare runs.

Shapes: N images of one sample, M of another, R resamples of G good and A anomalous images.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2_contingency, rankdata
from sklearn import metrics as sk

RESAMPLES = 1000  # of a bootstrap
RARE = 10  # a value of a chi-squared test that occurs less often


def image_metrics(scores_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """AUROC, AP and F1-max of image scores, min-max normalised over the set as in the released code.

    Args:
        scores_N: any real scores.
        labels_N: 1 anomalous, 0 good.
    """
    scores = np.asarray(scores_N, dtype=np.float64)
    spread = scores.max() - scores.min()
    return curve_metrics((scores - scores.min()) / (spread if spread > 0 else 1.0), np.asarray(labels_N).astype(int))


def auroc_of_resamples(scores_N: np.ndarray, good_RG: np.ndarray, bad_RA: np.ndarray) -> np.ndarray:
    """Image AUROC of every resample, [R]: the Mann-Whitney statistic of each row's good and anomalous images.

    Args:
        scores_N: of all images.
        good_RG, bad_RA: indices into them.
    """
    good_count, bad_count = good_RG.shape[1], bad_RA.shape[1]
    ranks = rankdata(scores_N[np.concatenate([good_RG, bad_RA], axis=1)], axis=1)[:, good_count:]
    return (ranks.sum(axis=1) - bad_count * (bad_count + 1) / 2) / (good_count * bad_count)


def auroc_interval(scores_N: np.ndarray, labels_N: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the image AUROC; good and anomalous images are resampled separately."""
    rng = np.random.default_rng(seed)
    good, bad = np.flatnonzero(labels_N == 0), np.flatnonzero(labels_N)
    areas = auroc_of_resamples(scores_N, *(rng.choice(kind, (RESAMPLES, len(kind))) for kind in (good, bad)))
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)


def pooled_chi_squared(a_N: np.ndarray, b_M: np.ndarray) -> float:
    """p-value of the chi-squared test that two samples of discrete values have the same distribution.

    Values that occur fewer than `RARE` times in both samples together are counted as one value, because the test is
    only valid for larger counts. 1 if a single value is left.
    """
    values, codes = np.unique(np.concatenate([a_N, b_M]), return_inverse=True)
    counts = np.stack(
        [np.bincount(codes[: len(a_N)], minlength=len(values)), np.bincount(codes[len(a_N) :], minlength=len(values))]
    )
    rare = counts.sum(axis=0) < RARE
    pooled = np.concatenate([counts[:, ~rare], counts[:, rare].sum(axis=1, keepdims=True)], axis=1)
    pooled = pooled[:, pooled.sum(axis=0) > 0]
    return 1.0 if pooled.shape[1] < 2 else float(chi2_contingency(pooled).pvalue)


def curve_metrics(scores_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """AUROC, AP and F1-max of scores against labels (1 anomalous, 0 good)."""
    precision, recall, _ = sk.precision_recall_curve(labels_N, scores_N)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * precision * recall / (precision + recall)
    return {
        "AUROC": float(sk.roc_auc_score(labels_N, scores_N)),
        "AP": float(sk.average_precision_score(labels_N, scores_N)),
        "F1max": float(f1[np.isfinite(f1)].max()),
    }
