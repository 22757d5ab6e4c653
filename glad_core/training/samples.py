"""The samples of a training run: the order of the good images, and the anomalies put into them.

Everything follows from the seed and the position in an endless order, so any process computes the same rows. Processes
that make data import this file and no networks.

Shapes: B batch, R image side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from glad_core import synthesis
from glad_core.foreground import foreground
from glad_core.images import to_tensor
from glad_core.training.recipe import Part, Recipe


@dataclass(frozen=True)
class Sample:
    """One position of the sample order: index of the good image, seeds of its anomaly, of t and noise, of its tile."""

    index: int
    anomaly_seed: int
    noise_seed: int
    tile_seed: int = 0


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


def sample_at(recipe: Recipe, position: int, count: int) -> Sample:
    """The sample at one position of the endless order: shuffled epochs over ``count`` images."""
    epoch, offset = divmod(position, count)
    index = _epoch_order(recipe.seed, epoch, count)[offset]
    return Sample(index, *(derived_seed(recipe.seed, use, epoch, index) for use in ("anomaly", "noise", "tile")))


def make_rows(
    images: Sequence[np.ndarray], samples: Sequence[Sample], recipe: Recipe, part: Part, textures: Tensor | None = None
) -> dict[str, np.ndarray]:
    """Rows for a loss of `glad_core.training.losses`, as arrays: the samples' images, with anomalies for the UNet.

    Args:
        images: the samples' good images, uint8 [R, R, 3] each.
        textures: pool for the synthesis, uint8 [M, H', W', 3]; None takes the images themselves.

    Returns:
        ``index``, ``seed`` int64 [B], ``image`` uint8 [B, R, R, 3]; for the UNet also ``mask`` bool [B, R, R] and
        ``good``, the images without anomalies.
    """
    rows = {
        "index": np.array([sample.index for sample in samples]),
        "seed": np.array([sample.noise_seed for sample in samples]),
        "image": np.stack(images),
    }
    if part != "unet":
        return rows
    pictures = torch.from_numpy(rows["image"])
    foreground_BHW = None
    if recipe.foreground_mode != 3:
        foreground_BHW = foreground(to_tensor(images), recipe.foreground_mode)
    anomalous, masks = synthesis.synthesize(
        pictures,
        seeds=[sample.anomaly_seed for sample in samples],
        textures=textures,
        foreground_BHW=foreground_BHW,
        probability=recipe.anomaly_probability,
    )
    return rows | {"good": rows["image"], "image": anomalous.numpy(), "mask": masks.numpy()}


def derived_seed(*parts: object) -> int:
    """A seed below 2^63 from anything that has a text form."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
