"""A request to judge one image, and the verdict on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from glad_core.adaptive import StopReason
from glad_core.bundle.model import Model
from glad_core.errors import GladError


@dataclass(frozen=True, eq=False)
class Request:
    """One image to judge, uint8 [R, R, 3] RGB at the bundle's resolution R. The category chooses the prompt."""

    image_id: str
    image: np.ndarray
    category: str | None = None


@dataclass(frozen=True)
class Tile:
    """One tile of a picture: its view, where it lies in pixels of the picture, and what came of it."""

    view: str
    top: int
    left: int
    height: int
    width: int
    score: float
    stop_step: int | None
    stop_reason: StopReason


@dataclass(frozen=True)
class Detection:
    """The verdict on one image, which may be a tile; or on a picture (`stitch`).

    ``anomaly_map`` is float16 [g, g] at token resolution, or [D, D] if the score has terms that only exist at full size
    (`scoring.full_size_only`); of a picture, a map of its shape, and ``full_size`` is its height and width at full size
    (None: D and D). ``tiles`` are those of a picture, empty if it is one tile. ``steps`` holds (timestep, step score)
    in the order compared. ``reconstruction`` is uint8 [R, R, 3]; of a picture, of its frame's shape. ``seconds`` is
    the image's share of the time of its batches. ``departures`` is how far the latents were from the input's at every
    step of the search; only the engine records it.
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
    full_size: tuple[int, int] | None = None
    tiles: list[Tile] = field(default_factory=list)


class NotFinite(GladError):
    """A score, map or step score of an image is NaN or infinite, so there is no verdict on it."""


def finite(detection: Detection) -> Detection | NotFinite:
    """The verdict, or the reason why there is none."""
    wrong = {
        "its score": math.isfinite(detection.score),
        "its anomaly map": bool(np.isfinite(detection.anomaly_map).all()),
        "a step score": all(math.isfinite(score) for _, score in detection.steps),
    }
    for name, good in wrong.items():
        if not good:
            return NotFinite(f"{name} is not a finite number")
    return detection


def check_request(model: Model, request: Request) -> None:
    """Check an image before it is queued.

    Raises:
        GladError: it is not uint8 [R, R, 3], or its category has no prompt in a bundle for several.
    """
    sides = sorted({framing.side for framing in model.settings.framings()})
    if request.image.shape not in [(side, side, 3) for side in sides] or request.image.dtype != np.uint8:
        raise GladError(
            f"{request.image_id}: expected uint8 {' or '.join(f'{side}x{side}x3' for side in sides)}, "
            f"got {request.image.dtype} {request.image.shape}: resize it to what the bundle's method sees"
        )
    model.prompts_for([request.category])
