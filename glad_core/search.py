"""Which steps of the chain to compare, when the first one whose score exceeds δ is all that is asked for.

The chain before the stop does not depend on the comparisons, and each costs several UNet calls, so they can be done
after the walk, from its end: a step score seldom falls along the chain. A step with score s rules out every earlier one
as long as no score falls by more than ``fall`` on the way, for an earlier one above δ would have left s above δ - fall.
``fall`` is the largest fall seen on good images (`largest_fall`); whatever it does not rule out is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from glad_core.errors import GladError
from glad_core.settings import Settings

Search = Literal["scan", "guarded"]


def search_of(settings: Settings, wanted: Search | None) -> Search:
    """How the stop step is found: as wanted, by default ``guarded`` where the bundle has its bound.

    Raises:
        GladError: ``guarded`` without the bound.
    """
    if wanted == "guarded" and settings.score_fall is None:
        raise GladError(
            "search 'guarded' needs the bound that calibration measures on good images: run `glad calibrate` on the "
            "bundle, or search by 'scan'"
        )
    return wanted or ("scan" if settings.score_fall is None else "guarded")


def next_comparison(scores: Mapping[int, float], walked: int, delta: float, fall: float | None) -> int | None:
    """The step to compare next, or None when the first crossing among the ``walked`` steps is known.

    Args:
        scores: step score of every step compared so far, by its place in the chain from 0.
        walked: steps walked; places 0 .. walked - 1 can be compared.
        delta: δ > 0, a step crosses where its score is larger.
        fall: the bound; None compares every step in order, as published ("scan").
    """
    crossing = first_crossing(scores, delta)
    end = walked if crossing is None else crossing
    if fall is None:
        return next((k for k in range(end) if k not in scores), None)
    if walked - 1 not in scores:
        return walked - 1
    ruled_out = max((k for k, score in scores.items() if k < end and score + fall <= delta), default=-1)
    unknown = [k for k in range(ruled_out + 1, end) if k not in scores]
    if not unknown or crossing is None:
        return unknown[-1] if unknown else None
    # Scores grow by about the same factor a step: where did this one pass δ? (Half of δ stands for the unseen start.)
    start = max(scores.get(ruled_out, delta / 2), delta / 1000)
    passed = math.log(delta / start) / math.log(scores[crossing] / start)
    expected = math.ceil(ruled_out + passed * (crossing - ruled_out))
    return min(unknown, key=lambda k: abs(k - expected))


def first_crossing(scores: Mapping[int, float], delta: float) -> int | None:
    """The first step compared whose score exceeds δ."""
    return min((k for k, score in scores.items() if score > delta), default=None)


def largest_fall(scores_NS: np.ndarray) -> float:
    """The largest amount by which any of N images' scores falls from one of S steps to any later one, at least 0."""
    highest_so_far = np.maximum.accumulate(scores_NS, axis=1)
    return float((highest_so_far - scores_NS).max(initial=0.0))
