"""What goes in and what comes out: a request to judge one image, and the verdict on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from glad_core.adaptive import StopReason
from glad_core.bundle.model import Model
from glad_core.errors import GladError


@dataclass(frozen=True, eq=False)
class Request:
    """One image to judge: uint8 [R, R, 3] RGB at the bundle's resolution R; its category chooses the prompt."""

    image_id: str
    image: np.ndarray
    category: str | None = None


@dataclass(frozen=True)
class Detection:
    """One verdict.

    ``anomaly_map`` is float16 [g, g] at token resolution, or [D, D] where the score needs terms that only exist at
    full size (`full_size_only`). ``steps`` holds every (timestep, step score) in the order they were compared.
    ``reconstruction`` is uint8 [R, R, 3]; ``seconds`` the image's share of the time of the batches it was in;
    ``departures`` how far the latents were from the input's at every step of the search, where the engine says so.
    """

    image_id: str
    score: float
    stop_step: int | None
    stop_reason: StopReason
    steps: list[tuple[int, float]]
    anomaly_map: np.ndarray
    reconstruction: np.ndarray
    seconds: float
    departures: list[float] = field(default_factory=list)


def check_request(model: Model, request: Request) -> None:
    """Refuse an image that is not uint8 [R, R, 3], or of a category that the bundle does not know (GladError)."""
    side = model.settings.resolution
    if request.image.shape != (side, side, 3) or request.image.dtype != np.uint8:
        raise GladError(
            f"{request.image_id}: expected uint8 {side}x{side}x3, "
            f"got {request.image.dtype} {request.image.shape}: resize it to the bundle's resolution"
        )
    model.prompts_for([request.category])
