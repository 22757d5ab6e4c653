"""One result as the report shows it: pictures small enough to embed, the contour, the numbers."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib import colormaps
from PIL import Image

from cluster.storage import Storage
from glad_core.bundle.settings import Settings
from pipelines.archive.decode import ImageError, decode, decode_image, fetch
from pipelines.report.contact_sheet import full_map

SIDE, MAP_SIDE = 256, 96  # pixels of embedded pictures and heat maps
LADDER = ((1.0, 78), (1.0, 55), (0.75, 50), (0.5, 40), (0.25, 30))  # side and WebP quality, until it fits
COLOURS = colormaps["inferno"]


@dataclass(frozen=True)
class HeatScale:
    """One scale for all heat maps of a page: clear below ``low``, logarithmic up to ``high``, in units of the map."""

    low: float
    high: float

    @classmethod
    def of(cls, scores: np.ndarray, threshold: float | None) -> HeatScale:
        """From half the threshold (without one: the median score) to the scores' 99th percentile."""
        low = threshold / 2 if threshold else float(np.median(scores)) if len(scores) else 0.0
        low = max(low, 1e-4)
        high = float(np.percentile(scores, 99)) if len(scores) else 0.0
        return cls(low, max(high, 4 * low))

    def colours(self, values: np.ndarray) -> np.ndarray:
        """RGBA, uint8 [..., 4]."""
        heat = np.log(np.maximum(values, self.low) / self.low) / np.log(self.high / self.low)
        heat = np.clip(heat, 0, 1)
        rgba = COLOURS(0.3 + 0.68 * heat)  # the darkest colours would only darken the picture
        rgba[..., 3] = np.clip(heat * 4, 0, 1) * 0.9
        return (rgba * 255).round().astype(np.uint8)


def make_card(
    row: dict[str, Any],
    place: dict[str, Any] | None,
    settings: Settings,
    scale: HeatScale,
    storage: Storage,
    most_bytes: int,
) -> dict[str, Any]:
    """What the page knows of a result. A picture that cannot be read any more leaves its reason in ``problem``.

    Args:
        place: the image's row in the manifest.
        most_bytes: of the pictures together, as encoded in the page.
    """
    problem, picture = None, None
    try:
        if place is None:
            raise ImageError("missing", "not in the manifest")
        picture = decode(fetch(storage, place), SIDE).pixels
    except ImageError as error:
        problem = f"{error.kind}: {error}"
    anomaly_map = _shrink(full_map(row, settings))
    most = most_bytes * 3 // 4  # base64
    again = row["reconstruction"]
    return {
        "id": row["image_id"],
        "uri": row["uri"],
        "category": row["category"] or "",
        "score": _number(row["score"]),
        "threshold": _number(row["threshold"]),
        "anomalous": row["is_anomalous"],
        "margin": _number(row["score"] / row["threshold"] if row["threshold"] else row["score"]),
        "step": row["stop_step"],
        "reason": row["stop_reason"] or "none",
        "steps": [[step["timestep"], _number(step["score"])] for step in row["steps"] or ()],
        "delta": settings.delta,
        "width": row["width"],
        "height": row["height"],
        "seconds": _number(row["seconds"]),
        "model": row["model_id"],
        "input": None if picture is None else webp(Image.fromarray(picture), int(most * 0.4)),
        "problem": problem,
        "reconstruction": None if again is None else webp(Image.fromarray(decode_image(again)), int(most * 0.4)),
        "heat": webp(Image.fromarray(scale.colours(anomaly_map)), int(most * 0.12)),
        "contour": _contour(anomaly_map, row["threshold"], int(most * 0.08)),
    }


def webp(image: Image.Image, most_bytes: int) -> str:
    """A picture as a data URI, at most `SIDE` pixels wide, smaller or coarser until it has at most ``most_bytes``."""
    side = min(SIDE, image.width)
    for share, quality in LADDER:
        small = image.resize((max(8, round(side * share)),) * 2, Image.Resampling.LANCZOS, reducing_gap=2)
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=quality, method=3)
        if stream.tell() <= most_bytes:
            break
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _shrink(anomaly_map: np.ndarray) -> np.ndarray:
    side = min(MAP_SIDE, anomaly_map.shape[0])
    image = Image.fromarray(anomaly_map.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _contour(anomaly_map: np.ndarray, threshold: float | None, most_bytes: int) -> str:
    """Where the map crosses the threshold: an SVG path in a square of 100 x 100; empty if it does not."""
    if threshold is None:
        return ""
    # A border below the threshold closes the lines that would end at the edge.
    padded = np.pad(anomaly_map, 1, constant_values=min(0.0, threshold - 1))
    scale = 100 / (anomaly_map.shape[0] - 1)
    lines = contour_generator(z=padded).lines(threshold)
    whole = ""
    for line in sorted(lines, key=len, reverse=True):  # type: ignore[arg-type]
        points = np.clip((np.asarray(line) - 1) * scale, 0, 100)
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        if len(whole) + len(path) > most_bytes:  # crumbs of a torn map
            break
        whole += path
    return whole


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")
