"""The scores of the good pictures behind a threshold, as a bundle keeps them, and p-values from them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from ctypes import c_float
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field, FiniteFloat

MOST_KEPT = 4000  # of a category; more would only make the smallest p-value smaller
MOST_IN_ALL = 20_000  # of a bundle's categories together: glad.json is a small file


def kept(scores: Iterable[float], categories: int = 1) -> list[float]:
    """Scores of one of so many categories as a bundle keeps them: in single precision as results are, ascending.

    Of more than `MOST_KEPT`, or than a category's share of `MOST_IN_ALL`, some are kept, evenly spread over their
    order: pictures chosen without regard to their scores, so that a p-value stays true.
    """
    single = [c_float(score).value for score in scores]
    count = min(len(single), MOST_KEPT, MOST_IN_ALL // categories)
    return sorted(single[number * len(single) // count] for number in range(count))


def p_value(score: float, good: Sequence[float]) -> float | None:
    """The conformal p-value (1 + number of good scores ≥ score) / (n + 1); None without good scores.

    If a picture is good, and as likely as any of the n to have any of the n + 1 scores (exchangeable), its p-value is
    at most α with probability at most α, for every α. It is never below 1 / (n + 1).

    Args:
        good: ascending, as `kept` returns them.
    """
    if not good:
        return None
    return (1 + len(good) - bisect_left(good, c_float(score).value)) / (len(good) + 1)


def _ascending(scores: list[float]) -> list[float]:
    if any(one > other for one, other in pairwise(scores)):
        raise ValueError("not in ascending order")
    return scores


KeptScores = Annotated[list[FiniteFloat], Field(min_length=1, max_length=MOST_KEPT), AfterValidator(_ascending)]
