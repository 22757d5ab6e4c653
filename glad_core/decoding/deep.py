"""Pictures of more than 8 bits a channel: all of their bits out of Pillow, which keeps the upper 8 of colours."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from glad_core.decoding import tiff

BAND = 64  # rows


def is_deep(mode: str) -> bool:
    """Whether a Pillow mode has more than 8 bits a channel."""
    return mode.startswith("I") or mode == "F"


def is_colour(image: ImageFile) -> bool:
    """Whether an image that is not decoded yet has colours, or grey and alpha, of 16 bits, of which Pillow keeps 8."""
    return bool(image.tile) and _raw(image).endswith((";16B", ";16L", ";16N")) and image.mode in ("RGB", "RGBA")


def keep_all(image: ImageFile) -> bool:
    """Have such an image, if it is grey with alpha, decoded to four bytes: the upper and lower ones of both.

    Returns:
        Whether it is; colours have no such way.
    """
    if _raw(image).startswith("LA;"):
        _decode_as(image, "RGBA")
        return True
    return False


def keep_lower(image: ImageFile) -> None:
    """Have the lower bytes of such an image decoded instead: its values read in the other byte order."""
    raw = _raw(image)
    big = raw.endswith("B") or (raw.endswith("N") and sys.byteorder == "big")
    _decode_as(image, raw[:-1] + ("L" if big else "B"))


def _raw(image: ImageFile) -> str:
    args = image.tile[0].args
    return str(args[0] if isinstance(args, tuple) else args)


def _decode_as(image: ImageFile, raw: str) -> None:
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile
    ]


def both_bytes(image: Image.Image) -> np.ndarray:
    """The grey values [H, W] of an image that `keep_all` was for."""
    values = np.empty((image.height, image.width), np.uint16)
    for top, band in _bands(image):
        values[top : top + len(band)] = band[..., 0] * np.uint16(256) + band[..., 1]
    return values


def upper_bytes(image: Image.Image) -> np.ndarray:
    """The values [H, W, 3] of 16-bit colours, the lower bytes 0."""
    values = np.empty((image.height, image.width, 3), np.uint16)
    for top, band in _bands(image):
        values[top : top + len(band)] = band[..., :3] * np.uint16(256)
    return values


def add_lower_bytes(values: np.ndarray, image: Image.Image) -> None:
    """Complete what `upper_bytes` returned."""
    for top, band in _bands(image):
        values[top : top + len(band)] |= band[..., :3]


def _bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """The first rows of parts of an image, and these: as a whole its copy may take 1 GB."""
    for top in range(0, image.height, BAND):
        yield top, np.asarray(image.crop((0, top, image.width, min(image.height, top + BAND))))


def grey_values(image: Image.Image) -> np.ndarray:
    """The values of a decoded grey image of more than 8 bits, [H, W], black 0."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(tiff.BITS) == (32,) and tags.get(tiff.FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)
    if tags.get(tiff.BITS) == (12,):  # packed; the whole range stays the whole range
        values = values * np.uint16(16)
    inverted = image.mode.startswith("I;16") and tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO
    return 65535 - values if inverted else values
