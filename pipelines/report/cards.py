"""One result as a card of the report: its numbers, and pictures small enough to embed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib import colormaps
from PIL import Image

from cluster.storage import StorageError
from glad_core.decoding.picture import ImageError, decode, decode_image
from glad_core.views import Framing
from pipelines.archive.fetch import fetch
from pipelines.runs.query import is_decided
from pipelines.runs.run import Run

SIDE, MAP_SIDE = 256, 96  # pixels, of pictures and heat maps
# Tried in this order until a picture is small enough: share of `SIDE`, WebP quality.
QUALITIES = ((1.0, 78), (1.0, 55), (0.75, 50), (0.5, 40), (0.25, 30))
# How a card's bytes are shared out.
INPUT_SHARE, TILE_SHARE, RECONSTRUCTION_SHARE, HEAT_SHARE, CONTOUR_SHARE = 0.25, 0.15, 0.4, 0.12, 0.08
BOX = ("left", "top", "width", "height")
COLOURS = colormaps["inferno"]
# Why the denoising of an image stopped, in words (column ``stop_reason``).
STOP_REASONS = {"difference": "difference", "min_step": "no difference", "none": "not compared"}


@dataclass(frozen=True)
class HeatScale:
    """One colour scale for all heat maps of a page: clear below ``low``, logarithmic up to ``high`` (map values)."""

    low: float
    high: float

    @classmethod
    def of(cls, scores: np.ndarray, threshold: float | None) -> HeatScale:
        """From half the threshold, or the median score if there is none, to the scores' 99th percentile."""
        low = threshold / 2 if threshold else float(np.median(scores)) if len(scores) else 0.0
        low = max(low, 1e-4)
        high = float(np.percentile(scores, 99)) if len(scores) else 0.0
        return cls(low, max(high, 4 * low))

    def colours(self, values: np.ndarray) -> np.ndarray:
        """Colours of map values, RGBA, uint8 [..., 4]."""
        heat = np.log(np.maximum(values, self.low) / self.low) / np.log(self.high / self.low)
        heat = np.clip(heat, 0, 1)
        rgba = COLOURS(0.3 + 0.68 * heat)  # the darkest colours would only darken the picture
        rgba[..., 3] = np.clip(heat * 4, 0, 1) * 0.9
        return (rgba * 255).round().astype(np.uint8)


def make_card(
    run: Run, row: dict[str, Any], manifest_row: dict[str, Any] | None, scale: HeatScale, most_bytes: int
) -> dict[str, Any]:
    """What the page shows of one result.

    Args:
        row: the result.
        manifest_row: where to read the image; None if the manifest does not list it.
        most_bytes: of the card's pictures together, as encoded in the page.
    """
    tile = deciding_tile(row)
    source, closer, problem = _source_picture(run, manifest_row, tile, run.settings_of(row["category"]).white_level)
    repaired = row["reconstruction"]
    # Of an undecided result nothing is drawn: no heat, no contour.
    anomaly_map = _shrink(np.nan_to_num(run.full_map(row), nan=0, posinf=0, neginf=0))
    decided = is_decided(row["score"], row["threshold"])
    threshold = row["threshold"] if decided else None
    standardised = len(run.settings_of(row["category"]).views) > 1
    most = most_bytes * 3 // 4  # base64 writes 3 bytes as 4
    return {
        "id": row["image_id"],
        "uri": row["uri"],
        "category": row["category"] or "",
        "score": _rounded(row["score"]),
        "threshold": _rounded(threshold),
        "decided": decided,
        "anomalous": row["is_anomalous"] if decided else None,
        **_beyond(row["score"], threshold, standardised),
        "p": _rounded(row.get("p_value")),
        "step": row["stop_step"],
        "reason": row["stop_reason"] or "none",
        "steps": [[step["timestep"], _rounded(step["score"])] for step in row["steps"] or ()],
        "delta": run.settings_of(row["category"]).delta,
        "width": row["width"],
        "height": row["height"],
        "doubt": row.get("doubt"),
        "seconds": _rounded(row["seconds"]),
        "model": row["model_id"],
        "input": None if source is None else webp(source, int(most * INPUT_SHARE)),
        "tile": None if closer is None else webp(closer, int(most * TILE_SHARE)),
        "tiles": len(row.get("tiles") or ()),
        "box": None if tile is None else _box(tile, row["width"], row["height"]),
        "problem": problem,
        "reconstruction": None
        if repaired is None
        else webp(Image.fromarray(decode_image(repaired)), int(most * RECONSTRUCTION_SHARE)),
        "heat": webp(Image.fromarray(scale.colours(anomaly_map)), int(most * HEAT_SHARE)),
        "contour": contour(anomaly_map, threshold, int(most * CONTOUR_SHARE)),
    }


def _beyond(score: float, threshold: float | None, standardised: bool) -> dict[str, Any]:
    """How a score compares with its threshold: ``margin``, by which cards are sorted, ``ratio`` if it means something.

    As `pipelines.runs.query` has both; and ``versus`` in words.
    """
    if threshold is None:
        return {"margin": _rounded(score), "ratio": None, "versus": ""}
    if threshold > 0 and not standardised:
        ratio = _rounded(score / threshold)
        return {"margin": ratio, "ratio": ratio, "versus": f"{score / threshold:.3g} × threshold"}
    distance = score - threshold
    unit = " spreads" if standardised else ""
    side = "above" if distance > 0 else "below"
    return {"margin": _rounded(1 + distance), "ratio": None, "versus": f"{abs(distance):.2g}{unit} {side} threshold"}


def deciding_tile(row: dict[str, Any]) -> dict[str, Any] | None:
    """The tile with the highest score, of those that are not the whole picture; None if the picture was not cut."""
    tiles = [tile for tile in row.get("tiles") or () if tile["view"] == "tiles"]
    return max(tiles, key=lambda tile: tile["score"], default=None)


def _box(tile: dict[str, Any], width: int, height: int) -> list[float]:
    """Left, top, width and height of a tile, per cent of the picture's."""
    return [100 * tile[name] / side for name, side in zip(BOX, (width, height) * 2, strict=True)]


def _source_picture(
    run: Run, manifest_row: dict[str, Any] | None, tile: dict[str, Any] | None, white: float | None
) -> tuple[Image.Image | None, Image.Image | None, str | None]:
    """The image, `SIDE` pixels wide, and its tile, or the reason why it can no longer be read."""
    if manifest_row is None:
        return None, None, "missing: not in the manifest"
    try:
        # Once: a page is made of results, and hundreds of its images may be out of reach.
        data = fetch(replace(run.storage, attempts=1), manifest_row)
        page = manifest_row.get("page")
        if tile is None:
            return Image.fromarray(decode(data, (Framing("squash", SIDE, white=white),), page).pixels), None, None
        # At its own size.
        whole = Image.fromarray(decode(data, (Framing("tiles", 1, white=white),), page).pixels)
    except ImageError as error:
        return None, None, f"{error.kind}: {error}"
    except StorageError as error:
        return None, None, str(error)
    left, top, width, height = (tile[name] for name in BOX)
    small = whole.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2)
    return small, whole.crop((left, top, left + width, top + height)), None


def webp(image: Image.Image, most_bytes: int) -> str:
    """A picture as a WebP data URI, at most `SIDE` pixels wide, in the best of `QUALITIES` within ``most_bytes``.

    If none is small enough, it has the last of them.
    """
    side = min(SIDE, image.width)
    for share, quality in QUALITIES:
        small = image.resize((max(8, round(side * share)),) * 2, Image.Resampling.LANCZOS, reducing_gap=2)
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=quality, method=3)
        if stream.tell() <= most_bytes:
            break
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _shrink(anomaly_map: np.ndarray) -> np.ndarray:
    """The map at no more than `MAP_SIDE` pixels a side."""
    image = Image.fromarray(anomaly_map.astype(np.float32))
    share = min(1.0, MAP_SIDE / max(image.size))
    size = (max(2, round(image.width * share)), max(2, round(image.height * share)))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def contour(anomaly_map: np.ndarray, threshold: float | None, most_bytes: int) -> str:
    """The line where the map crosses the threshold, as an SVG path in a square of 100 x 100; empty if it does not.

    Its shortest pieces are left out if they exceed ``most_bytes``.
    """
    if threshold is None:
        return ""
    # A border below the threshold closes lines that would end at the edge.
    padded = np.pad(anomaly_map, 1, constant_values=min(0.0, threshold - 1))
    scale = 100 / (np.array(anomaly_map.shape[::-1]) - 1)  # of x and y
    lines = contour_generator(z=padded).lines(threshold)
    path = ""
    for line in sorted(lines, key=len, reverse=True):  # type: ignore[arg-type]
        points = np.clip((np.asarray(line) - 1) * scale, 0, 100)
        piece = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        if len(path) + len(piece) > most_bytes:
            break
        path += piece
    return path


def _rounded(value: float | None) -> float | None:
    """Five significant digits, to keep the page small; None for no finite number, which JSON lacks."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")
