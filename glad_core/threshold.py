"""The decision threshold from scores of good images alone, and how many of them a false-positive rate α needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

TARGET_FPR = 0.05  # where nobody chose another
FAR_MORE, RARE = 3.0, 0.001  # times the images that a threshold allows, and no chance: they are not like the good ones


def images_needed(target_fpr: float, confidence: float | None = None) -> int:
    """How many good images a false-positive rate α needs.

    The conformal quantile needs ⌈1/α⌉ - 1. For `confident_threshold` at least one image in n must exceed the 1 - α
    quantile with probability ``confidence``: (1 - α)ⁿ ≤ 1 - confidence.
    """
    if confidence is None:
        return math.ceil(1 / target_fpr - 1e-9) - 1
    return math.ceil(math.log(1 - confidence) / math.log(1 - target_fpr) - 1e-9)


def conformal_quantile(scores: Sequence[float] | np.ndarray, target_fpr: float) -> float:
    """The ⌈(n + 1)(1 - α)⌉-th smallest score (split conformal prediction); the largest if n is too small for α."""
    rank = math.ceil((len(scores) + 1) * (1 - target_fpr))
    return float(np.sort(np.asarray(scores, dtype=np.float64))[min(rank, len(scores)) - 1])


def confident_threshold(scores: Sequence[float] | np.ndarray, target_fpr: float, confidence: float) -> float:
    """A score that a share of more than ``target_fpr`` of new good images exceeds with probability ≤ 1 - confidence.

    That is over all sets of good images that the scores might have come from (the tolerance limit of Wilks, 1941); the
    conformal quantile keeps the rate on average over them. The k-th largest score is taken, the largest k for which at
    most k - 1 of n scores exceed the 1 - α quantile with probability ≤ 1 - confidence.

    Raises:
        ValueError: fewer scores than `images_needed`.
    """
    n = len(scores)
    if n < images_needed(target_fpr, confidence):
        raise ValueError(f"{n} scores are too few for {target_fpr:g} with confidence {confidence:g}")
    k = 1
    while binom.cdf(k, n, target_fpr) <= 1 - confidence:
        k += 1
    return float(np.sort(np.asarray(scores, dtype=np.float64))[-k])


def far_more(exceeding: int, count: int, target_fpr: float) -> bool:
    """Whether more of ``count`` images exceed a threshold than if all were like the good images behind it.

    More than `FAR_MORE` times as many as its target allows, and by chance with a probability below `RARE`.
    """
    return exceeding > FAR_MORE * target_fpr * count and bool(binom.sf(exceeding - 1, count, target_fpr) < RARE)
