"""Pictures of more than 8 bits a channel: all of their bits out of Pillow, which keeps the upper 8 of colours."""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from pipelines.archive import tiff


def is_deep(mode: str) -> bool:
    """Whether a Pillow mode has more than 8 bits a channel."""
    return mode.startswith("I") or mode == "F"


def is_colour(image: ImageFile) -> bool:
    """Whether an image that is not decoded yet has colours, or grey and alpha, of 16 bits, of which Pillow keeps 8."""
    return bool(image.tile) and _raw(image).endswith((";16B", ";16L", ";16N")) and image.mode in ("RGB", "RGBA")


def keep_lower(image: ImageFile) -> bool:
    """Have the lower bytes of such an image decoded instead: its values read in the other byte order.

    Returns:
        Whether it is grey with alpha instead, which comes out as four bytes: the upper and lower one of both.
    """
    raw = _raw(image)
    big = raw.endswith("B") or (raw.endswith("N") and sys.byteorder == "big")
    grey = raw.startswith("LA;")
    other = "RGBA" if grey else raw[:-1] + ("L" if big else "B")
    image.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other) for tile in image.tile
    ]
    return grey


def _raw(image: ImageFile) -> str:
    args = image.tile[0].args
    return str(args[0] if isinstance(args, tuple) else args)


def combined(upper: Image.Image, lower: Image.Image, grey: bool) -> np.ndarray:
    """The values of an image of 16-bit colours from both halves, [H, W, 3]; of grey with alpha [H, W]."""
    low = np.asarray(lower)
    if grey:
        return low[..., 0] * np.uint16(256) + low[..., 1]
    values = np.asarray(upper)[..., :3].astype(np.uint16)
    values <<= 8
    values |= low[..., :3]
    return values


def grey_values(image: Image.Image) -> np.ndarray:
    """The values of a decoded grey image of more than 8 bits, [H, W], black 0."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(tiff.BITS) == (32,) and tags.get(tiff.FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)
    if tags.get(tiff.BITS) == (12,):  # packed; the whole range stays the whole range
        values = values * np.uint16(16)
    inverted = image.mode.startswith("I;16") and tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO
    return 65535 - values if inverted else values
