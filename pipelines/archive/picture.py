"""Encoded bytes to pixels, within limits. A process of its own runs this: it imports no more than that takes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from glad_core.views import Framing
from pipelines.archive import damage

# EPS would start Ghostscript and the exotic decoders are where the security holes are: only what cameras write.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF")
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
OTHER_FORMATS = {
    b"jP  ": "JPEG 2000",
    b"JXL ": "JPEG XL",
    b"ftypheic": "HEIC",
    b"ftypmif1": "HEIF",
    b"ftypavif": "AVIF",
}
MAX_PIXELS = 250_000_000  # with more it is taken for a decompression bomb
MAX_PAGES = 10_000  # of one file
MAX_MEMORY = 3 * 2**30  # bytes that decoding one image may take
TOO_MUCH = f"its decoder asked for more memory than the {MAX_MEMORY // 2**20} MiB that one image may take"

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Bombs are refused below with an error of our own; Pillow's warning would only repeat it in worker logs.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def is_image(path: str) -> bool:
    """Whether a file's suffix says that it is an image. The one rule for what a dataset or a tar shard holds."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


class ImageError(Exception):
    """An image that cannot be had. ``kind`` is its error_type, from missing to deadly (docs/troubleshooting.md)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


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
        ImageError: not_an_image, damaged or too_large.
    """
    framings = as_framings(framings)
    image, peak = _decoded(data, framings[0].white, page)
    height, width = image.shape[:2]
    return Picture([framing.frame(image) for framing in framings], width, height, peak)


def as_framings(framings: int | Sequence[Framing]) -> Sequence[Framing]:
    """The framings; a number is the side of one square."""
    return (Framing("squash", framings),) if isinstance(framings, int) else framings


def decode_image(data: bytes) -> np.ndarray:
    """Encoded bytes to uint8 [H, W, 3] RGB, upright by its EXIF orientation. See `to_rgb` for the colour modes.

    Raises:
        ImageError: not_an_image, damaged or too_large.
    """
    return _decoded(data, None)[0]


def _decoded(data: bytes, white: float | None, page: int | None = None) -> tuple[np.ndarray, float | None]:
    """`decode_image`, and the largest stored value if there are more than 8 bits."""
    image = _open(data, page)
    try:
        peak = float(np.asarray(image).max()) if is_deep(image.mode) else None
        return np.asarray(to_rgb(image, white)), peak
    except ImageError:
        raise
    except Exception as error:
        raise _refused(error) from error


def pages(data: bytes) -> list[int]:
    """Numbers of the pages of a TIFF and of the frames of an animation, from 1: each is a picture of its own.

    Reduced copies (thumbnails, pyramids) and transparency masks in a TIFF are left out. So are the further pictures in
    a JPEG, which are previews and depth maps.

    Raises:
        ImageError: as `decode_image`; too_large also with more than `MAX_PAGES`.
    """
    return _pages(_header(data))


def _pages(image: Image.Image) -> list[int]:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        found, last = _tiff_pages(image)
    else:
        last = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        found = list(range(1, min(last, MAX_PAGES) + 1))
    if last > MAX_PAGES:
        raise ImageError("too_large", f"more than {MAX_PAGES} pages")
    return found or [1]


def _tiff_pages(image: TiffImagePlugin.TiffImageFile) -> tuple[list[int], int]:
    """The pages that are no copies, and the number of all. One that cannot be opened counts: decoding it says why."""
    found, number, opened = [], 1, True
    while number <= MAX_PAGES:
        if not opened or not _is_reduced(image):
            found.append(number)
        try:
            image.seek(number)
            opened = True
        except EOFError:
            return found, number
        except Exception:  # as in `_header`
            if opened is False:  # two in a row: the chain of pages is broken
                return found, number
            opened = False
        number += 1
    return found, number


def _is_reduced(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether a TIFF's page is a reduced copy of another or a transparency mask (NewSubfileType, SubfileType)."""
    return bool(int(image.tag_v2.get(254, 0)) & 5) or image.tag_v2.get(255) == 2


def _header(data: bytes) -> Image.Image:
    """An image that is opened and not decoded. Raises as `decode_image`."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"decompression bomb: {error}") from error
    except Image.UnidentifiedImageError as error:
        if damage.looks_like_an_image(data):
            raise ImageError("damaged", "begins like an image, but is cut off or of a kind that is not read") from error
        raise ImageError("not_an_image", f"not PNG, JPEG, BMP, TIFF, WebP, GIF or PPM{_named(data)}") from error
    except Exception as error:  # decoders raise whatever their parsing meets
        raise _refused(error) from error


def _open(data: bytes, page: int | None = None) -> Image.Image:
    """A decoded image, upright, in the mode that it is stored in. Raises as `decode_image`."""
    image = _header(data)
    try:
        if page is None and isinstance(image, TiffImagePlugin.TiffImageFile) and _is_reduced(image):
            page = _pages(image)[0]
        image.seek((page or 1) - 1)
    except Exception as error:
        raise _refused(error) from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            "too_large", f"decompression bomb: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS} in all"
        )
    try:
        _check(damage.of_structure(data, image))
        _ignore_alpha(image)
        image.load()
        _check(damage.of_pixels(data, image))
        ImageOps.exif_transpose(image, in_place=True)
    except ImageError:
        raise
    except Exception as error:
        raise _refused(error) from error
    return image


def read_labels(data: bytes) -> tuple[np.ndarray, bool]:
    """The stored values of a mask, [H, W] or [H, W, C] of any type, upright; and whether its compression is lossy.

    Of a palette the indices, or its colours if they say which one is the background. Nothing is scaled, as
    `decode_image` does: a label 1 of 16 bits stays 1.

    Raises:
        ImageError: as `decode_image`.
    """
    image = _open(data)
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


def orientation(data: bytes) -> int:
    """An image's EXIF orientation: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 on its side.

    Raises:
        ImageError: as `decode_image`.
    """
    stored = _header(data).getexif().get(ExifTags.Base.Orientation, 1)
    return stored if stored in range(2, 9) else 1


def _check(problem: str | None) -> None:
    if problem is not None:
        raise ImageError("damaged", problem)


def _named(data: bytes) -> str:
    """The name of a format that is not read, to be told what to convert; empty if its signature is unknown."""
    return next((f" but {name}" for mark, name in OTHER_FORMATS.items() if data.startswith(mark, 4)), "")


def _ignore_alpha(image: Image.Image) -> None:
    """Have a TIFF with associated alpha decoded to its stored colours: Pillow divides them by alpha, 0 makes black."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        for number, tile in enumerate(image.tile):
            assert isinstance(tile.args, tuple)
            raw = tile.args[0].replace("RGBa", "RGBA")
            image.tile[number] = tile._replace(args=("A" if raw == "a" else raw, *tile.args[1:]))


def is_deep(mode: str) -> bool:
    """Whether a Pillow mode has more than 8 bits a channel."""
    return mode.startswith("I") or mode == "F"


def to_rgb(image: Image.Image, white: float | None = None) -> Image.Image:
    """Any Pillow mode to RGB, 8 bits.

    Transparency is ignored, as in the field's data loaders: cameras write files whose alpha is 0 everywhere. Of
    more than 8 bits, ``white`` becomes 255, and what is brighter too (see `Framing`); without it the full range stays
    the full range: 16-bit values are divided by 257, floating point is taken as 0..1. CMYK is converted without a
    colour profile.

    Raises:
        ImageError: damaged, if values are negative or not finite; without ``white``, if integers exceed 16 bits or
            floats 1.
    """
    mode = image.mode
    if is_deep(mode):
        values = np.asarray(image).astype(np.float64)
        top = (1.0 if mode == "F" else 65535.0) if white is None else white or max(float(values.max()), 1e-9)
        if not np.isfinite(values).all() or values.min() < 0 or (white is None and values.max() > top):
            raise ImageError("damaged", f"grey values outside 0..{top:g} cannot be brought to 8 bits")
        image = Image.fromarray(np.round(np.minimum(values * (255 / top), 255)).astype(np.uint8))
    if mode == "La":  # as in `_ignore_alpha`: converted, its grey would be divided by alpha
        image = Image.frombytes("LA", image.size, image.tobytes())
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _refused(error: Exception) -> ImageError:
    """The error for a decoder's exception. (WebP's decoder reports too little memory as damage.)"""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return ImageError("too_large", TOO_MUCH)
    return ImageError("damaged", " ".join(f"{type(error).__name__}: {error}".split())[:300])
