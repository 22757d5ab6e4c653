"""Which steps of the chain to compare in order to find the first one whose score exceeds δ.

The chain before the stop does not depend on the comparisons, and a comparison costs as much as several UNet calls. So
the guarded search compares few steps, after the walk and from its end. Step scores seldom fall along the chain. If no
score falls by more than ``fall``, a step with a score of at most δ - fall rules out all earlier steps: had one of them
exceeded δ, this score would be above δ - fall. ``fall`` is the largest fall measured on good images (`largest_fall`).
Every step that is not ruled out is compared.

A guess chooses which of these steps is compared first, and whether before the end of the walk; a wrong guess only costs
calls. It follows from how fast the latents depart from the input's (`guess_scores`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from glad_core.bundle.settings import Search, Settings
from glad_core.errors import GladError

Guess = tuple[float, float, float, float]

TINY = 1e-6  # stands for smaller scores and departures, so that all have a logarithm


def search_of(settings: Settings, choice: Search | None) -> Search:
    """How the stop step is found: the user's choice; by default ``guarded`` if the bundle has its bound.

    Raises:
        GladError: ``guarded`` without the bound.
    """
    if choice == "guarded" and settings.score_fall is None:
        raise GladError(
            "search 'guarded' needs the bound that calibration measures on good images: run `glad calibrate` on the "
            "bundle, or search by 'scan'"
        )
    return choice or ("scan" if settings.score_fall is None else "guarded")


def next_comparison(
    scores: Mapping[int, float],
    walked: int,
    delta: float,
    fall: float | None,
    guessed: Sequence[float] | None = None,
) -> int | None:
    """The step to compare next; None if the first crossing among the ``walked`` steps is known, or that there is none.

    Args:
        scores: step score of every step compared so far, by its index in the chain from 0.
        walked: number of steps walked; indices 0 .. walked - 1 can be compared.
        delta: δ > 0; a step with a larger score is a crossing.
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
        expected = None if guessed is None else expected_crossing(scores, guessed, delta)
        expected = walked - 1 if expected is None else expected
    else:
        # Scores grow by about the same factor at every step; half of δ stands for the score of a start not compared.
        start = max(scores.get(ruled_out, delta / 2), delta / 1000)
        share = math.log(delta / start) / math.log(scores[crossing] / start)
        expected = math.ceil(ruled_out + share * (crossing - ruled_out))
    return min(unknown, key=lambda k: abs(k - expected))


def expected_crossing(scores: Mapping[int, float], guessed: Sequence[float], delta: float) -> int | None:
    """The first step whose guessed score exceeds δ, after correcting all guesses by the error of the last one known."""
    error = math.log(max(scores[max(scores)], TINY)) - guessed[max(scores)] if scores else 0.0
    return next((k for k, score in enumerate(guessed) if score + error > math.log(delta)), None)


def first_crossing(scores: Mapping[int, float], delta: float) -> int | None:
    """The first of the compared steps whose score exceeds δ."""
    return min((k for k, score in scores.items() if score > delta), default=None)


def largest_fall(scores_NS: np.ndarray) -> float:
    """The largest amount by which any of N images' scores falls from one of S steps to any later one, at least 0."""
    highest_so_far = np.maximum.accumulate(scores_NS, axis=1)
    return float((highest_so_far - scores_NS).max(initial=0.0))


def guess_scores(departures: Sequence[float], guess: Guess) -> list[float]:
    """Guess ln s_k of the steps walked from how far the latents had departed at each (`Detection.departures`).

    ln s_k ≈ a + b·g + (c + d·g)·k, with g the mean growth of the departure's logarithm per step.
    """
    growth = float(_growth(np.array([departures]))[0])
    a, b, c, d = guess
    return [a + b * growth + (c + d * growth) * k for k in range(len(departures))]


def fit_guess(scores_NS: np.ndarray, departures_NS: np.ndarray) -> Guess | None:
    """Fit the (a, b, c, d) of `guess_scores` by least squares to N images, good and anomalous, after 2 to S steps.

    None if the chain has a single step: there is nothing to guess. Latents of zeros have no departure relative to them;
    such images are left out.
    """
    known = np.isfinite(departures_NS).all(axis=1)
    scores_NS, departures_NS = scores_NS[known], departures_NS[known]
    rows, targets = [], []
    for walked in range(2, scores_NS.shape[1] + 1):
        growth = _growth(departures_NS[:, :walked])
        for k in range(walked):
            rows.append(np.stack([np.ones_like(growth), growth, np.full_like(growth, k), k * growth], axis=1))
            targets.append(np.log(np.maximum(scores_NS[:, k], TINY)))
    if not rows or not known.any():
        return None
    a, b, c, d = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0].tolist()
    return a, b, c, d


def _growth(departures_NS: np.ndarray) -> np.ndarray:
    first, last = np.log(np.maximum(departures_NS[:, [0, -1]], TINY)).T
    return (last - first) / max(1, departures_NS.shape[1] - 1)
