"""Encoded bytes to pixels, within limits. A process of its own runs this: it imports no more than that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from glad_core.decoding import opened
from glad_core.decoding.opened import ImageError
from glad_core.views import Framing

SUFFIXES = {
    "png apng": "PNG",
    "jpg jpeg jpe jfif jif jfi": "JPEG",
    "bmp dib": "BMP",
    "tif tiff": "TIFF",
    "webp": "WebP",
    "ppm pgm pbm pnm": "PPM",
    "gif": "GIF",
    "jp2 j2k jxl heic heif avif": "not read; an error says so, where other files would be left out",
}
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffixes in SUFFIXES for suffix in suffixes.split())
BAND = 2**20  # values that are scaled in one go


def is_image(path: str) -> bool:
    """Whether a file's suffix says that it is an image. The one rule for what a dataset or a tar shard holds."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Picture:
    """A decoded image: its frame in every view asked for, uint8 RGB, and the size it had upright, in pixels."""

    frames: list[np.ndarray]
    width: int
    height: int
    peak: float | None = None  # largest stored value of a picture of more than 8 bits
    packed: bytes | None = None  # the bytes that the frames are views of, if they are one piece

    @property
    def pixels(self) -> np.ndarray:
        """The frame of the first view."""
        return self.frames[0]


def decode(data: bytes, framings: int | Sequence[Framing], page: int | None = None) -> Picture:
    """Encoded bytes to a `Picture`.

    Args:
        framings: of the views; a number is the side of one square.
        page: of an animation or a TIFF, from 1; None for the first of `pages`.

    Raises:
        ImageError: not_an_image, unsupported, damaged or too_large.
    """
    framings = as_framings(framings)
    image, peak = _decoded(data, framings[0].white, page)
    height, width = image.shape[:2]
    return Picture([framing.frame(image) for framing in framings], width, height, peak)


def as_framings(framings: int | Sequence[Framing]) -> Sequence[Framing]:
    """The framings; a number is the side of one square."""
    return (Framing("squash", framings),) if isinstance(framings, int) else framings


def decode_image(data: bytes) -> np.ndarray:
    """Encoded bytes to uint8 [H, W, 3] RGB, upright by its EXIF orientation. See `to_rgb` and `to_8_bits`.

    Raises:
        ImageError: not_an_image, unsupported, damaged or too_large.
    """
    return _decoded(data, None)[0]


def _decoded(data: bytes, white: float | None, page: int | None = None) -> tuple[np.ndarray, float | None]:
    """`decode_image`, and the largest stored value if there are more than 8 bits."""
    stored = opened.stored(data, page)
    try:
        if isinstance(stored, Image.Image):
            return np.asarray(to_rgb(stored)), None
        grey = to_8_bits(stored, white)
        peak = float(stored.max()) if stored.dtype.itemsize > 1 else None
        return np.repeat(grey[..., None], 3, -1) if grey.ndim == 2 else grey, peak
    except ImageError:
        raise
    except Exception as error:
        raise opened.refused(error) from error


def read_labels(data: bytes) -> tuple[np.ndarray, bool]:
    """The stored values of a mask, [H, W] or [H, W, C] of any type, upright; and whether its compression is lossy.

    Of a palette the indices, or its colours if they say which one is the background. Nothing is scaled, as
    `decode_image` does: a label 1 of 16 bits stays 1.

    Raises:
        ImageError: as `decode_image`.
    """
    image = opened.stored(data)
    if isinstance(image, np.ndarray):
        return image, False
    lossy = image.format == "JPEG" or (image.format == "WEBP" and b"VP8L" not in data[:64])
    if image.mode == "P":
        return _palette_labels(image), lossy
    # In CMYK nothing is white.
    return np.asarray(image.convert("RGB") if image.mode == "CMYK" else image), lossy


def _palette_labels(image: Image.Image) -> np.ndarray:
    """Indices [H, W]; but colours [H, W, 3] if every index in use has one of its own and one of these is black.

    Background is black then, whatever its index: programs sort a palette as they like.
    """
    indices = np.asarray(image)
    used = np.unique(indices)
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    if used[-1] >= len(palette) or len(np.unique(palette[used], axis=0)) < len(used) or palette[used].any(axis=1).all():
        return indices
    colours: np.ndarray = palette[indices]
    return colours


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode of 8 bits to RGB.

    Transparency is ignored, as in the field's data loaders: cameras write files whose alpha is 0 everywhere. CMYK is
    converted without a colour profile.
    """
    if image.mode == "La":  # as in `tiff.mend`: converted, its grey would be divided by alpha
        image = Image.frombytes("LA", image.size, image.tobytes())
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def to_8_bits(values: np.ndarray, white: float | None = None) -> np.ndarray:
    """Stored values [H, W, ...] to uint8.

    ``white`` becomes 255, and what is brighter too (see `Framing`); without it the full range stays the full range:
    16-bit values are divided by 257, floating point is taken as 0..1. Values of 8 bits stay.

    Raises:
        ImageError: damaged, if values are negative or not finite; without ``white``, if integers exceed 16 bits or
            floats 1.
    """
    least, most = values.min(), values.max()
    top = 1.0 if values.dtype.kind == "f" else 65535.0
    if values.dtype.itemsize == 1:
        top, white = 255.0, None
    top = top if white is None else white or max(float(most), 1e-9)
    if not np.isfinite(least) or not np.isfinite(most) or least < 0 or (white is None and most > top):
        raise ImageError("damaged", f"grey values outside 0..{top:g} cannot be brought to 8 bits")
    out = np.empty(values.shape, np.uint8)
    rows = max(1, BAND // values[0].size)
    for start in range(0, len(values), rows):
        band = values[start : start + rows].astype(np.float64)
        band *= 255 / top
        out[start : start + rows] = np.rint(np.minimum(band, 255, out=band), out=band)
    return out
