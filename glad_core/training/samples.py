"""What a training run sees and when: the order of the good images, and the anomalies put into them.

Everything follows from (seed, position in the endless order), so it is the same whoever computes which part of it.
Data workers import this and no network code.

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
    """One place of the sample order: which good image, the seed of its anomaly, the seed of its t and noise."""

    index: int
    anomaly_seed: int
    noise_seed: int


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


def sample_at(recipe: Recipe, position: int, count: int) -> Sample:
    """What is at one position of the endless order: shuffled epochs over ``count`` images."""
    epoch, place = divmod(position, count)
    index = _epoch_order(recipe.seed, epoch, count)[place]
    return Sample(index, *(derived_seed(recipe.seed, what, epoch, index) for what in ("anomaly", "noise")))


def make_rows(
    images: Sequence[np.ndarray], samples: Sequence[Sample], recipe: Recipe, part: Part, textures: Tensor | None = None
) -> dict[str, np.ndarray]:
    """What a loss of `glad_core.training.losses` takes, as arrays: the samples' images, for the UNet with anomalies.

    Args:
        images: the samples' good images, uint8 [R, R, 3] each.
        textures: pool for the synthesis, uint8 [M, H', W', 3]; the images themselves serve when None.

    Returns:
        ``index``, ``seed`` int64 [B], ``image`` uint8 [B, R, R, 3], for the UNet also ``mask`` bool [B, R, R].
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
    return rows | {"image": anomalous.numpy(), "mask": masks.numpy()}


def derived_seed(*parts: object) -> int:
    """A seed below 2^63 from anything that prints."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
