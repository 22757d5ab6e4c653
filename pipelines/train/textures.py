"""The textures of synthetic anomalies."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cluster.storage import Storage, join
from glad_core.decoding.picture import ImageError, decode
from glad_core.errors import GladError
from pipelines.archive.fetch import Row, fetch

if TYPE_CHECKING:
    import torch  # takes seconds to import, which finding and surveying images does not need

MAX_TEXTURES = 500


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
