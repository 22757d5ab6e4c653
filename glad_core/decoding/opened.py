"""A file's picture, opened at a page and decoded as it is stored, by Pillow or tifffile; or why it cannot be."""

from __future__ import annotations

import io
import threading
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from PIL.ImageFile import ImageFile

from glad_core.decoding import damage, deep, tiff

# EPS would start Ghostscript and the exotic decoders are where the security holes are: only what cameras write.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF")
OTHER_FORMATS = (  # position and bytes that tell, and what it is
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"ftypavi", "AVIF"),
    (128, b"DICM", "DICOM"),
    (0, b"%PDF", "PDF"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"8BPS", "Photoshop's PSD"),
    (0, b"version https://git-lfs", "the pointer to a file in Git LFS"),
    (0, b"<!", "HTML or XML"),
    (0, b"<html", "HTML or XML"),
    (0, b"<?xml", "HTML or XML"),
)
MAX_PIXELS = 250_000_000  # with more it is taken for a decompression bomb
MAX_PAGES = 10_000  # of one file
MAX_MEMORY = 3 * 2**30  # bytes that decoding one image may take
TOO_MUCH = f"its decoder asked for more memory than the {MAX_MEMORY // 2**20} MiB that one image may take"

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Bombs are refused below with an error of our own; Pillow's warning would only repeat it in worker logs.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """An image that cannot be had. ``kind`` is its error_type, from missing to deadly (docs/troubleshooting.md)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Last(threading.local):
    """The file of whose pages this thread decoded one after the first, opened: the next frame builds on it."""

    data = b""
    image: ImageFile | None = None


_LAST = _Last()


def pages(data: bytes) -> tuple[list[int], int]:
    """Numbers of the pages of a TIFF and of the frames of an animation, from 1: each is a picture of its own.

    Reduced copies (thumbnails, pyramids) and transparency masks in a TIFF are left out. So are the further pictures in
    a JPEG, which are previews and depth maps. The second value is the number of all.

    Raises:
        ImageError: as `decode_image`; too_large also with more than `MAX_PAGES`.
    """
    if data.startswith(tiff.SIGNATURES):
        try:
            numbers, count = tiff.pages(data, MAX_PAGES)
        except Exception as error:
            raise refused(error) from error
    else:
        image = _header(data)
        count = getattr(image, "n_frames", 1)
        numbers = list(range(1, 2 if image.format == "MPO" else min(count, MAX_PAGES) + 1))
    if count > MAX_PAGES:
        raise ImageError("too_large", f"more than {MAX_PAGES} pages")
    return numbers or [1], count


def stored(data: bytes, page: int | None = None) -> Image.Image | np.ndarray:
    """A decoded picture, upright: an image, or of more than 8 bits its stored values [H, W] or [H, W, 3].

    Raises as `decode_image`.
    """
    is_tiff = data.startswith(tiff.SIGNATURES)
    page = page or (pages(data)[0][0] if is_tiff else 1)
    try:
        image = _at_page(data, page)
    except ImageError as error:
        if is_tiff and error.kind == "damaged":
            return _other_tiff(data, page)
        raise
    if isinstance(image, TiffImagePlugin.TiffImageFile) and not tiff.trusted(image):
        return _other_tiff(data, page)
    if not deep.is_colour(image):
        upright = _loaded(image, data, keep=page > 1)
        if page > 1:
            _LAST.data, _LAST.image = data, image
        return deep.grey_values(upright) if deep.is_deep(upright.mode) else upright
    if page > 1 and not is_tiff:
        raise ImageError("unsupported", "an animation of 16-bit colours is not read; write its frames as files")
    if deep.keep_all(image):
        return deep.both_bytes(_loaded(image, data))
    values = deep.upper_bytes(_loaded(image, data))
    image = _at_page(data, page)  # the one before takes no memory any more
    deep.keep_lower(image)
    deep.add_lower_bytes(values, _loaded(image, data))
    return values


def _at_page(data: bytes, page: int) -> ImageFile:
    """An opened image at a page. Raises as `decode_image`."""
    image = _LAST.image if _LAST.data == data else None
    image = image if image is not None and image.tell() < page - 1 else None
    _LAST.data, _LAST.image = b"", None  # unless the page comes out well
    try:
        image = _header(data) if image is None else image
        image.seek(page - 1)
    except ImageError:
        raise
    except Exception as error:
        raise refused(error) from error
    _check_size(image.width, image.height)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            "too_large", f"decompression bomb: {width} x {height} pixels, the limit is {MAX_PIXELS} in all"
        )


def _loaded(image: ImageFile, data: bytes, keep: bool = False) -> Image.Image:
    """A decoded image, upright, in the mode that it is stored in. Raises as `decode_image`.

    Args:
        keep: turn a copy, since the next frame builds on this one.
    """
    try:
        _check(damage.of_structure(data, image))
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            tiff.mend(image)
        image.load()
        _check(damage.of_pixels(data, image))
        if _orientation(image) == 1:
            return image
        if keep:
            return ImageOps.exif_transpose(image)
        ImageOps.exif_transpose(image, in_place=True)
    except ImageError:
        raise
    except Exception as error:
        raise refused(error, data) from error
    return image


def _other_tiff(data: bytes, number: int) -> np.ndarray:
    """The values of a TIFF's page that Pillow does not read right, as of `stored`. Raises as `decode_image`."""
    try:
        with tiff.page(data, number) as page:
            _check_size(page.imagewidth, page.imagelength)
            return tiff.values(page, len(data))
    except ImageError:
        raise
    except tiff.UnreadTiffError as error:
        raise ImageError(
            "unsupported", f"{error} is not read; write it uncompressed, as unsigned integers of 8 or 16 bits"
        ) from error
    except Exception as error:
        raise refused(error) from error


def orientation(data: bytes) -> int:
    """A file's EXIF orientation: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 on its side.

    Raises:
        ImageError: as `decode_image`.
    """
    try:
        return _orientation(_header(data))
    except ImageError:
        if not data.startswith(tiff.SIGNATURES):
            raise
    with tiff.page(data, 1) as page:
        stored = tiff.orientation(page)
    return stored if stored in range(2, 9) else 1


def _orientation(image: ImageFile) -> int:
    """As `orientation`. EXIF data that cannot be read turn nothing."""
    try:
        stored = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `_header`
        return 1
    return stored if stored in range(2, 9) else 1


def _check(problem: str | None) -> None:
    if problem is not None:
        raise ImageError("damaged", problem)


def _named(data: bytes) -> str:
    """The name of a format that is not read, to be told what to convert; empty if its signature is unknown."""
    return next((f" but {name}" for start, mark, name in OTHER_FORMATS if data.startswith(mark, start)), "")


def _header(data: bytes) -> ImageFile:
    """An image that is opened and not decoded. Raises as `decode_image`."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"decompression bomb: {error}") from error
    except Image.UnidentifiedImageError as error:
        if kind := damage.unread_kind(data):
            raise _unread(kind) from error
        if damage.looks_like_an_image(data):
            raise ImageError("damaged", "begins like an image, but is cut off or of a kind that is not read") from error
        raise ImageError("not_an_image", f"not PNG, JPEG, BMP, TIFF, WebP, GIF or PPM{_named(data)}") from error
    except Exception as error:  # decoders raise whatever their parsing meets
        raise refused(error, data) from error


def _unread(kind: str) -> ImageError:
    return ImageError("unsupported", f"{kind} is not read; write it as PNG or TIFF of 8 or 16 bits")


def refused(error: Exception, data: bytes = b"") -> ImageError:
    """The error for a decoder's exception on ``data``. (WebP's decoder reports too little memory as damage.)"""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return ImageError("too_large", TOO_MUCH)
    if kind := damage.unread_kind(data, str(error)):
        return _unread(kind)
    return ImageError("damaged", " ".join(f"{type(error).__name__}: {error}".split())[:300])
