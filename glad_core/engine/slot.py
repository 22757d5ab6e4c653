"""The state of one image in flight.

Shapes: C latent channels, H W latent grid, h w token grid, R image side, L D prompt tokens and their width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from glad_core.adaptive import StopReason
from glad_core.verdict import Detection, Request


@dataclass(frozen=True)
class Comparison:
    """One compared step: its score, token map [h, w] and the two clean predictions [C, H, W] (Sec. 3.3)."""

    score: float
    token_map: Tensor
    x0_hat: Tensor
    x0_true: Tensor


@dataclass(eq=False)
class Slot:
    """An image in flight, between its encoding and its verdict.

    ``image`` is [3, R, R], ``prompt`` [L, D]; the latents ``z`` of the image, its noise ``eps`` and its current state
    ``x`` are [C, H, W]. ``k`` is the index in the chain of the step that comes next. While the stop step is unknown
    (``searching``), ``kept`` holds x_t and ε̂ of every step walked, so that the image can go back to any of them, and
    ``departures`` how far x_t was from the noised input. ``steps`` holds (timestep, step score) in the order compared.
    """

    request: Request
    image: Tensor
    z: Tensor
    eps: Tensor
    prompt: Tensor
    x: Tensor
    searching: bool
    departures: list[float] = field(default_factory=list)
    k: int = 0
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    compared: dict[int, Comparison] = field(default_factory=dict)
    steps: list[tuple[int, float]] = field(default_factory=list)
    stop_step: int | None = None
    stop_reason: StopReason = "none"
    seconds: float = 0.0

    @property
    def scores(self) -> dict[int, float]:
        """Step scores by index in the chain."""
        return {k: comparison.score for k, comparison in self.compared.items()}

    def record(self, k: int, timestep: int, comparison: Comparison) -> None:
        """Keep the comparison at step ``k``."""
        self.compared[k] = comparison
        self.steps.append((timestep, comparison.score))

    def end_search(self) -> None:
        """The stop step is known: free what was kept for going back."""
        self.searching = False
        self.kept, self.compared = [], {}

    def detection(self, score: float, anomaly_map: np.ndarray, reconstruction: np.ndarray) -> Detection:
        """The verdict, from what `judge.conclude` returned for this image."""
        return Detection(
            image_id=self.request.image_id,
            score=score,
            stop_step=self.stop_step,
            stop_reason=self.stop_reason,
            steps=self.steps,
            anomaly_map=anomaly_map,
            reconstruction=reconstruction,
            seconds=self.seconds,
            departures=self.departures,
        )
