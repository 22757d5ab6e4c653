"""From a manifest row to pixels: fetch the bytes, decode them, resize. A failure becomes the row's error."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image, ImageOps

from cluster import session
from cluster.storage import Storage, StorageError, explain, is_outage
from glad_core.images import resize

# EPS would start Ghostscript and the exotic decoders are where the security holes are: only what cameras write.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})
MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: about 9459 x 9459
MAX_BYTES = 512 * 2**20
MAX_MEMORY = 3 * 2**30  # bytes that decoding one image may take
TOO_MUCH = f"its decoder asked for more memory than the {MAX_MEMORY // 2**20} MiB that one image may take"
FETCH_THREADS = 8
TRIES = 2  # for an image that has a process to itself

# Bombs are refused below with an error of our own; Pillow's warning would only repeat it in worker logs.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def is_image(path: str) -> bool:
    """Whether a file's suffix says that it is an image. The one rule for what a dataset or a tar shard holds."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


class ImageError(Exception):
    """A file that cannot be decoded. ``kind``: missing, unreadable, empty, not_an_image, damaged, too_large."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Picture:
    """A decoded image: uint8 [R, R, 3] RGB, and the size it had upright, in pixels."""

    pixels: np.ndarray
    width: int
    height: int


DECODED_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("category", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),  # R * R * 3 bytes, null if there is an error
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("position", pa.int64()),
    ]
)


def fetch_and_decode(storage: Storage, resolution: Callable[[str | None], int]) -> Callable[[pa.Table], pa.Table]:
    """A stage: manifest rows in, `DECODED_SCHEMA` rows out, one for one. It raises only if storage does not answer.

    Args:
        resolution: side to which images of a category are resized, pixels.
    """

    def stage(rows: pa.Table) -> pa.Table:
        manifest = rows.to_pylist()
        if session.is_retry():  # an image may have killed the process
            decoded = [_decode_apart(storage, row, resolution(row["category"])) for row in manifest]
        else:
            with ThreadPoolExecutor(FETCH_THREADS) as pool:
                fetched = list(pool.map(lambda row: _fetch_row(storage, row), manifest))
            # One by one, so that each has the whole memory budget; several tasks decode in parallel.
            decoded = [
                _decode_row(row, data, resolution(row["category"])) for row, data in zip(manifest, fetched, strict=True)
            ]
        return pa.Table.from_pylist(decoded, schema=DECODED_SCHEMA)

    return stage


def _fetch_row(storage: Storage, row: dict[str, Any]) -> bytes | ImageError | None:
    if row.get("error_type"):  # already lost while listing, e.g. a damaged tar shard
        return None
    try:
        return fetch(storage, row)
    except ImageError as error:
        return error


def _decode_row(row: dict[str, Any], data: bytes | ImageError | None, resolution: int) -> dict[str, Any]:
    out = _kept(row)
    if data is None:
        return out | {name: row[name] for name in ("stage", "error_type", "message")}
    if isinstance(data, ImageError):
        return out | {"stage": "fetch", "error_type": data.kind, "message": str(data)}
    try:
        with memory_limit(MAX_MEMORY):
            picture = decode(data, resolution)
    except ImageError as error:
        return out | {"stage": "decode", "error_type": error.kind, "message": str(error)}
    except MemoryError:  # raised by resizing; `decode` handles its own
        return out | {"stage": "decode", "error_type": "too_large", "message": TOO_MUCH}
    return out | {"width": picture.width, "height": picture.height, "image": picture.pixels.tobytes()}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a manifest row that stay with the image."""
    return {name: row.get(name) for name in ("image_id", "uri", "category", "position")}


def _fetch_and_decode_row(storage: Storage, row: dict[str, Any], resolution: int) -> dict[str, Any]:
    return _decode_row(row, _fetch_row(storage, row), resolution)


@contextmanager
def memory_limit(budget: int) -> Iterator[None]:
    """Lets this process take ``budget`` bytes more than it has now, and no more; Linux only.

    A decoder that asks for more fails with an error. The limit holds for every thread of the process, and one of Ray's
    that meets it may end the process: the image is then tried again apart, as one that killed its process.
    """
    if not hasattr(psutil, "RLIMIT_DATA"):
        yield
        return
    process = psutil.Process()
    before = process.rlimit(psutil.RLIMIT_DATA)
    limits = [process.memory_info().data + budget, *(limit for limit in before if limit >= 0)]  # -1 is none
    process.rlimit(psutil.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_DATA, before)


def _decode_apart(storage: Storage, row: dict[str, Any], resolution: int) -> dict[str, Any]:
    """Fetch and decode in a process of its own, so that an image that kills its process is identified."""
    import ray

    task: Any = ray.remote(num_cpus=0, max_retries=TRIES - 1)(_fetch_and_decode_row)
    try:
        return ray.get(task.remote(storage, row, resolution))
    except ray.exceptions.WorkerCrashedError:
        message = f"the process that decoded it died {TRIES} times"
        return _kept(row) | {"stage": "decode", "error_type": "deadly", "message": message}
    except ray.exceptions.RayError as error:
        raise session.root_cause(error, StorageError) from None


def fetch(storage: Storage, row: dict[str, Any]) -> bytes:
    """The bytes of one manifest row; of a tar member only its own range is read.

    Raises:
        ImageError: missing, unreadable, empty or too_large.
        StorageError: the server does not answer, which says nothing about the image.
    """
    file = row.get("shard") or row["uri"]
    try:
        size = row["size"] if row["size"] is not None else storage.size(file)
        if size > MAX_BYTES:
            raise ImageError("too_large", f"{size} bytes, more than the {MAX_BYTES} read for one image")
        data = storage.read(file, row["offset"], size) if row.get("shard") else storage.read(file)
    except StorageError as error:
        raise ImageError("unreadable", str(error)) from error
    except FileNotFoundError as error:
        raise ImageError("missing", f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise StorageError(explain(file, storage.endpoint, error)) from error
        raise ImageError("unreadable", explain(file, storage.endpoint, OSError(str(error)))) from error
    if not data:
        raise ImageError("empty", "the file has no bytes")
    return data


def decode(data: bytes, resolution: int) -> Picture:
    """Encoded bytes to a `Picture`; the first frame of an animation or a multi-page TIFF.

    Raises:
        ImageError: not_an_image, damaged or too_large.
    """
    image = decode_image(data)
    height, width = image.shape[:2]
    return Picture(resize(image, resolution), width, height)


def decode_image(data: bytes) -> np.ndarray:
    """Encoded bytes to uint8 [H, W, 3] RGB, upright by its EXIF orientation. See `to_rgb` for the colour modes.

    Raises:
        ImageError: not_an_image, damaged or too_large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"decompression bomb: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("not_an_image", "not PNG, JPEG, BMP, TIFF, WebP, GIF or PPM") from error
    except Exception as error:  # decoders raise whatever their parsing meets
        raise _refused(error) from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            "too_large", f"decompression bomb: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS} in all"
        )
    try:
        image.load()
        return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    except ImageError:
        raise
    except Exception as error:
        raise _refused(error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, 8 bits.

    Transparency is composited on black. 16-bit values are divided by 257, so that the full range stays the full range
    and nothing is clipped. Floating point is taken as 0..1; CMYK is converted without a colour profile.

    Raises:
        ImageError: damaged, if integers exceed 16 bits or floats leave 0..1.
    """
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        values = np.asarray(image).astype(np.float64)
        top = 1.0 if mode == "F" else 65535.0
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
            raise ImageError("damaged", f"grey values outside 0..{top:g} cannot be brought to 8 bits")
        image = Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _refused(error: Exception) -> ImageError:
    """The error for a decoder's exception. (WebP's decoder reports too little memory as damage.)"""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return ImageError("too_large", TOO_MUCH)
    return ImageError("damaged", " ".join(f"{type(error).__name__}: {error}".split())[:300])
