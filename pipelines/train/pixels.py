"""Decoded pixels of training images and textures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cluster.storage import Storage, join
from glad_core.errors import GladError
from glad_core.views import Frames, Framing
from pipelines.archive.fetch import FETCH_THREADS, Row, fetch
from pipelines.archive.picture import ImageError, Picture, decode
from pipelines.train.good_images import GoodImage

if TYPE_CHECKING:
    import torch  # takes seconds to import, which finding and surveying images does not need

MAX_TEXTURES = 500
CACHED_IMAGES = 512  # decoded images that a process keeps


@lru_cache(maxsize=CACHED_IMAGES)
def read_picture(storage: Storage, uri: str, framings: int | tuple[Framing, ...]) -> Picture:
    """A decoded image, kept for the next call. Raises ImageError if it cannot be read."""
    return decode(fetch(storage, {"uri": uri, "size": None}), framings)


def read_pixels(images: Sequence[GoodImage], resolution: int, storage: Storage) -> list[np.ndarray]:
    """Decoded images, uint8 [R, R, 3] each."""
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        return list(pool.map(lambda image: read_picture(storage, image.uri, resolution).pixels, images))


def read_frames(images: Sequence[GoodImage], framings: tuple[Framing, ...], storage: Storage) -> Iterator[Frames]:
    """Decoded images as the views see them."""
    for image in images:
        picture = decode(fetch(storage, {"uri": image.uri, "size": None}), framings)
        yield Frames(picture.frames, (picture.height, picture.width))


@lru_cache(maxsize=1)
def texture_pool(storage: Storage, folder: str, resolution: int) -> torch.Tensor:
    """`load_textures`, once per process."""
    return load_textures(folder, resolution, storage)


def load_textures(folder: str, resolution: int, storage: Storage, limit: int = MAX_TEXTURES) -> torch.Tensor:
    """The first ``limit`` readable images below a folder, local or S3: uint8 [M, R, R, 3].

    Raises:
        GladError: no image there.
    """
    import torch

    pixels: list[np.ndarray] = []
    rows: list[Row] = []
    for path, size in storage.walk(folder):
        if len(pixels) == limit:
            break
        try:
            row = {"uri": join(folder, path), "size": size}
            pixels.append(decode(fetch(storage, row, lambda: rows[-1:]), resolution).pixels)
        except ImageError:
            continue
        rows.append(row)
    if not pixels:
        raise GladError(f"{folder}: no texture images in it; name a folder of pictures such as DTD's")
    return torch.from_numpy(np.stack(pixels))
