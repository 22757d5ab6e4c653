"""TIFFs: which of their pages are pictures, and the values of those that Pillow does not read or reads wrong."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import TiffImagePlugin

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, PLANES, FORMAT = 258, 262, 284, 339  # tags
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
# What tifffile expands without its large companion: nothing, ZIP, PackBits, LZMA.
COMPRESSIONS, PREDICTORS = (1, 8, 32946, 32773, 34925), (1, 2)


class UnreadTiffError(Exception):
    """A sound TIFF of a kind that neither library reads; the text names it."""


def pages(data: bytes, most: int) -> tuple[list[int], int]:
    """Numbers, from 1, of the pages that are no reduced copies or masks, and how many pages there are.

    One that cannot be opened counts: decoding it says why. With more than ``most`` pages none is opened.

    Raises:
        Exception: whatever the parsing of a damaged file meets.
    """
    with _opened(data) as file:
        count = len(file.pages)
        if count > most:
            return [], count
        numbers = [number for number in range(1, count + 1) if not _is_copy(file, number)]
        broken = _breaks_off(file, data)
        return numbers + [count + 1] * broken, count + broken


def _opened(data: bytes) -> TiffFile:
    from tifffile import TiffFile  # of most pictures no process needs it

    return TiffFile(io.BytesIO(data))


def _breaks_off(file: TiffFile, data: bytes) -> bool:
    """Whether the last page names a next one, which then is not there."""
    layout = file.tiff
    try:
        start = file.pages.get(len(file.pages) - 1).offset
    except Exception:  # that page is counted already
        return False
    (tags,) = struct.unpack_from(layout.tagnoformat, data, start)
    following = start + layout.tagnosize + tags * layout.tagsize
    return following + layout.offsetsize > len(data) or struct.unpack_from(layout.offsetformat, data, following)[0] != 0


def _is_copy(file: TiffFile, number: int) -> bool:
    """Whether a page is a reduced copy of another or a transparency mask (NewSubfileType, SubfileType)."""
    try:
        tags = file.pages.get(number - 1).aspage().tags
        return bool(int(tags.valueof(254, 0)) & 5) or tags.valueof(255) == 2
    except Exception:
        return False


def trusted(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether Pillow decodes an opened page to what is stored; `mend` may have to help."""
    tags = image.tag_v2
    bits, formats = tags.get(BITS, (1,)), tags.get(FORMAT, (1,))
    if max(bits) <= 8:
        return 2 not in formats  # signed: negative values would be bright
    apart = len(bits) > 1 and tags.get(PLANES, 1) == 2
    inverted = image.mode == "F" and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    return len(set(bits)) == 1 and not apart and not inverted


def mend(image: TiffImagePlugin.TiffImageFile) -> None:
    """Have a page that is not decoded yet decoded to the colours that are stored.

    Pillow divides colours by alpha, where 0 makes black; takes what libtiff expands for the file's byte order, which is
    this machine's; and takes 0 for white if the file does not say so.
    """
    native = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
    for number, tile in enumerate(image.tile):
        assert isinstance(tile.args, tuple)
        raw = tile.args[0].replace("RGBa", "RGBA")
        raw = native.get(raw, raw) if tile.codec_name == "libtiff" else raw
        if raw == "L;I" and PHOTOMETRIC not in image.tag_v2:
            raw = "L"
        image.tile[number] = tile._replace(args=("A" if raw == "a" else raw, *tile.args[1:]))


@contextmanager
def page(data: bytes, number: int) -> Iterator[TiffPage]:
    """A page, from 1, for `values` and `orientation`. Raises whatever the parsing of a damaged file meets."""
    with _opened(data) as file:
        yield file.pages.get(number - 1).aspage()


def orientation(page: TiffPage) -> int:
    """Its EXIF orientation, from 1 to 8 if it is valid."""
    return int(page.tags.valueof(274, 1))


def values(page: TiffPage, size: int) -> np.ndarray:
    """The stored values of a page: [H, W] grey or [H, W, 3] colours, black 0, upright.

    Args:
        size: of the file in bytes.

    Raises:
        UnreadTiffError: of a kind that is not read.
        Exception: whatever the decoding of a damaged file meets.
    """
    apart = page.planarconfig == 2 and page.samplesperpixel > 1
    photometric = page.tags.valueof(PHOTOMETRIC, RGB if page.samplesperpixel > 2 else BLACK_IS_ZERO)
    samples = 3 if photometric == RGB else 1
    readable = (
        photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        and page.samplesperpixel in (samples, samples + 1)  # alpha, which is ignored
        and page.bitspersample in (8, 16, 32, 64)
        and page.dtype is not None
        and page.dtype.kind in ("u" if photometric == WHITE_IS_ZERO else "uif")
        and page.compression in COMPRESSIONS
        and page.predictor in PREDICTORS
        and page.fillorder == 1
        and page.imagedepth == 1
    )
    if not readable:
        raise UnreadTiffError(_kind(page, apart))
    if missing := _missing(page, size):
        raise ValueError(missing)
    stored = page.asarray(maxworkers=1)
    bands = stored if apart else np.moveaxis(stored[..., None] if stored.ndim == 2 else stored, -1, 0)
    picture = bands[0] if samples == 1 else np.moveaxis(bands[:3], 0, -1)
    if photometric == WHITE_IS_ZERO:
        picture = np.iinfo(picture.dtype).max - picture
    return _upright(picture, orientation(page))


def _upright(values: np.ndarray, way: int) -> np.ndarray:
    """[H, W, ...] turned by an EXIF orientation."""
    if way in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if way in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if way in (3, 4, 7, 8) else values


def _missing(page: TiffPage, size: int) -> str | None:
    """What a page lacks that its reader would fill with black."""
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(segments) < np.prod(page.chunked):
        return "rows are missing"
    return "cut off" if any(not count or start + count > size for start, count in segments) else None


def _kind(page: TiffPage, apart: bool) -> str:
    """For example "a TIFF of 3 x 32-bit float (planes apart, LZW)"."""
    formats = {1: "integer", 2: "signed integer", 3: "float"}
    kind = f"{page.samplesperpixel} x {page.bitspersample}-bit {formats.get(page.sampleformat, 'complex')}"
    notes = {
        "planes apart": apart,
        _name(page.compression): page.compression != 1,
        f"predictor {page.predictor:d}": page.predictor not in PREDICTORS,
        "bits reversed": page.fillorder != 1,
        _name(page.photometric): True,
    }
    return f"a TIFF of {kind} ({', '.join(note for note, is_so in notes.items() if is_so)})"


def _name(value: int) -> str:
    return str(getattr(value, "name", value))
