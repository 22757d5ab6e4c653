"""`glad export --masks`: what is above the threshold in black and white, and the heat map, at the picture's size."""

from __future__ import annotations

import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

from pipelines.export.images import Judged

HEAT = (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
MIDDLE = 128  # the colour of the threshold; twice the threshold, and all above, is the last one


def mask(image: Judged) -> bytes:
    """PNG, 255 where an alarm's map is above the threshold; black all over for every other image."""
    if not image.is_alarm:
        return _png(Image.new("L", image.size))
    return _png(Image.fromarray(np.where(_at_size(image) > image.row["threshold"], np.uint8(255), np.uint8(0))))


def heat(image: Judged) -> bytes:
    """PNG, the map in colours from 0 to twice the threshold; of an image without one to the map's own maximum."""
    values, threshold = _at_size(image), image.threshold
    unit = threshold if threshold and threshold > 0 else float(values.max()) / 2 or 1.0
    return _png(Image.fromarray(HEAT[np.clip(values / unit * MIDDLE, 0, 255).astype(np.uint8)]))


def _at_size(image: Judged) -> np.ndarray:
    return np.asarray(Image.fromarray(image.map.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=3)
    return stream.getvalue()
