"""What a caller of `Detector` may give for a picture, as stored values: a file's path, a PIL image or an array."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from glad_core.decoding import deep, opened
from glad_core.decoding.picture import to_8_bits, to_rgb
from glad_core.errors import GladError

FURTHER = "the first of {} pages; the others were not judged"


class PictureOf(NamedTuple):
    """uint8 [H, W, 3]; the largest stored value if there are more than 8 bits; a doubt about what was taken."""

    image: np.ndarray
    peak: float | None
    doubt: str | None


def picture_of(given: Any, white: float | None, name: str) -> PictureOf:
    """The picture that is meant, as `glad score` decodes a file of it.

    Args:
        given: path of a file, PIL image, or array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, of uint16 or of
            fractions 0..1; RGB, alpha is ignored.
        white: the bundle's white level, for more than 8 bits.
        name: for messages.

    Raises:
        GladError: no such file, no picture, a damaged one, or an array of another kind.
    """
    doubt = None
    try:
        if isinstance(given, str | os.PathLike):
            data = _read(given)
            numbers, _ = opened.pages(data)
            stored = opened.stored(data, numbers[0])
            doubt = FURTHER.format(len(numbers)) if len(numbers) > 1 else None
        else:
            stored = _upright(given) if isinstance(given, Image.Image) else _values(given)
        if isinstance(stored, Image.Image):
            return PictureOf(np.asarray(to_rgb(stored)), None, doubt)
        peak = float(stored.max()) if stored.dtype.itemsize > 1 else None
        grey = to_8_bits(stored, white)
    except opened.ImageError as error:
        raise GladError(f"{name}: {error}") from error
    return PictureOf(np.repeat(grey[..., None], 3, -1) if grey.ndim == 2 else grey, peak, doubt)


def _read(path: str | os.PathLike[str]) -> bytes:
    if "://" in str(path):
        raise GladError(f"{path}: only files of this machine are read here; `glad score` reads other places")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise GladError(
            f"{path}: {error.strerror or error}; give the path of one picture, or a list of them"
        ) from error


def _upright(image: Image.Image) -> Image.Image | np.ndarray:
    """A PIL image as `opened.stored` gives one."""
    if isinstance(image, ImageFile) and deep.is_colour(image):
        raise GladError("Pillow keeps 8 of this picture's 16 bits; give its path instead")
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise whatever their parsing meets
        raise opened.refused(error) from error
    return deep.grey_values(upright) if deep.is_deep(upright.mode) else upright


def _values(given: Any) -> np.ndarray:
    values = np.asarray(given)
    if values.dtype.kind not in "uif" or not values.size:
        raise GladError(f"expected a path, a PIL image or an array of numbers, got {type(given).__name__}")
    if values.ndim == 3 and values.shape[2] in (1, 3, 4):
        values = values[..., 0] if values.shape[2] == 1 else values[..., :3]
    elif values.ndim != 2:
        raise GladError(f"expected an array [H, W] or [H, W, 3], got {list(values.shape)}; of several give a list")
    if values.dtype == np.int8:
        raise GladError("8-bit values below zero are no brightness; give uint8")
    return values
