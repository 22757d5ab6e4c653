"""Which steps of the chain to compare, when the first one whose score exceeds δ is all that is asked for.

The chain before the stop does not depend on the comparisons, and each costs several UNet calls, so they can be done
after the walk, from its end: a step score seldom falls along the chain. A step with score s rules out every earlier one
as long as no score falls by more than ``fall`` on the way, for an earlier one above δ would have left s above δ - fall.
``fall`` is the largest fall seen on good images (`largest_fall`); whatever it does not rule out is compared.

Which of these to compare first, and whether to before the end of the walk, is a guess, and a bad one only costs calls:
how fast the latents depart from the input's tells about where the score has passed δ (`guess_scores`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from glad_core.bundle.settings import Search, Settings
from glad_core.errors import GladError

Guess = tuple[float, float, float, float]

TINY = 1e-6  # smaller scores and departures are taken for this one, which has a logarithm


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


def next_comparison(
    scores: Mapping[int, float],
    walked: int,
    delta: float,
    fall: float | None,
    guessed: Sequence[float] | None = None,
) -> int | None:
    """The step to compare next, or None when the first crossing among the ``walked`` steps is known.

    Args:
        scores: step score of every step compared so far, by its place in the chain from 0.
        walked: steps walked; places 0 .. walked - 1 can be compared.
        delta: δ > 0, a step crosses where its score is larger.
        fall: the bound; None compares every step in order, as published ("scan").
        guessed: logarithm of every walked step's score, by `guess_scores`; without it the search begins at the end.
    """
    crossing = first_crossing(scores, delta)
    end = walked if crossing is None else crossing
    if fall is None:
        return next((k for k in range(end) if k not in scores), None)
    ruled_out = max((k for k, score in scores.items() if k < end and score + fall <= delta), default=-1)
    unknown = [k for k in range(ruled_out + 1, end) if k not in scores]
    if not unknown:
        return None
    if crossing is None:
        passed = None if guessed is None else expected_crossing(scores, guessed, delta)
        expected = walked - 1 if passed is None else passed
    else:
        # Scores grow by about the same factor a step: where did it pass δ? (Half of δ stands for the unseen start.)
        start = max(scores.get(ruled_out, delta / 2), delta / 1000)
        share = math.log(delta / start) / math.log(scores[crossing] / start)
        expected = math.ceil(ruled_out + share * (crossing - ruled_out))
    return min(unknown, key=lambda k: abs(k - expected))


def expected_crossing(scores: Mapping[int, float], guessed: Sequence[float], delta: float) -> int | None:
    """The first step whose score would exceed δ as guessed, or by as much more as the last one compared is more."""
    more = math.log(max(scores[max(scores)], TINY)) - guessed[max(scores)] if scores else 0.0
    return next((k for k, score in enumerate(guessed) if score + more > math.log(delta)), None)


def first_crossing(scores: Mapping[int, float], delta: float) -> int | None:
    """The first step compared whose score exceeds δ."""
    return min((k for k, score in scores.items() if score > delta), default=None)


def largest_fall(scores_NS: np.ndarray) -> float:
    """The largest amount by which any of N images' scores falls from one of S steps to any later one, at least 0."""
    highest_so_far = np.maximum.accumulate(scores_NS, axis=1)
    return float((highest_so_far - scores_NS).max(initial=0.0))


def guess_scores(departures: Sequence[float], guess: Guess) -> list[float]:
    """ln s_k of the steps walked, from how far the latents had departed at each (`Detection.departures`).

    ln s_k ≈ a + b·g + (c + d·g)·k, where g is by how much the departure's logarithm has grown per step.
    """
    growth = float(_growth(np.array([departures]))[0])
    a, b, c, d = guess
    return [a + b * growth + (c + d * growth) * k for k in range(len(departures))]


def fit_guess(scores_NS: np.ndarray, departures_NS: np.ndarray) -> Guess | None:
    """The (a, b, c, d) of `guess_scores`, by least squares over N images, good and anomalous, after 2 to S steps.

    None for a single step, where nothing is to guess.
    """
    rows, targets = [], []
    for walked in range(2, scores_NS.shape[1] + 1):
        growth = _growth(departures_NS[:, :walked])
        for k in range(walked):
            rows.append(np.stack([np.ones_like(growth), growth, np.full_like(growth, k), k * growth], axis=1))
            targets.append(np.log(np.maximum(scores_NS[:, k], TINY)))
    if not rows:
        return None
    a, b, c, d = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0].tolist()
    return a, b, c, d


def _growth(departures_NS: np.ndarray) -> np.ndarray:
    first, last = np.log(np.maximum(departures_NS[:, [0, -1]], TINY)).T
    return (last - first) / max(1, departures_NS.shape[1] - 1)
