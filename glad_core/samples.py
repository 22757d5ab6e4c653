"""What a training run sees and when: the recipe, the order of the good images, and the anomalies put into them.

Everything follows from (seed, position in the endless order), so it is the same whoever computes which part of it.
Data workers import this and no network code.

Shapes: B batch, R image side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from glad_core import synthesis
from glad_core.images import to_tensor

Part = Literal["unet", "dino", "vae"]


class Recipe(BaseModel):
    """How a part is trained; the defaults are the released code's for the UNet (its 8-bit optimiser aside)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(2000, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="images of one optimiser step, over all workers")
    micro_batch: int | None = Field(None, ge=1, description="images of one pass; gradients accumulate to batch_size")
    learning_rate: float = Field(5e-6, gt=0, description="of AdamW, or of Muon (what it leaves to AdamW has a tenth)")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: 5 % warm-up, then to zero")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW; with Muon there is none")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are cut to this norm")
    blend: bool = Field(
        True, description="mix x^a with x by t / 1000 before the loss (released code), else Eq. 10 as is"
    )
    anomaly_probability: float = Field(0.5, ge=0, le=1, description="share of images that get a synthetic anomaly")
    foreground_mode: Literal[1, 2, 3] = Field(3, description="anomalies on 1 darker, 2 brighter object, 3 anywhere")
    max_timestep: int = Field(1000, ge=1, le=1000, description="timesteps are drawn below this")
    keep: float = Field(0.01, ge=0, description="λ of the DINO adaptation: pull towards the features as they were")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep an exponential moving average of the weights")
    autocast: Literal["off", "bf16", "fp16"] = Field("off", description="precision of the networks' matrix products")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw", description="adamw8bit needs bitsandbytes and a GPU; muon is for networks trained from nothing"
    )
    seed: int = Field(0, ge=0, description="of the order, the anomalies, timesteps and noise")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[self.autocast]


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
    """What a loss of `glad_core.losses` takes, as arrays: the samples' images, for the UNet with anomalies.

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
    foreground = None
    if recipe.foreground_mode != 3:
        foreground = synthesis.foreground(to_tensor(images), recipe.foreground_mode)
    anomalous, masks = synthesis.synthesize(
        pictures,
        seeds=[sample.anomaly_seed for sample in samples],
        textures=textures,
        foreground_BHW=foreground,
        probability=recipe.anomaly_probability,
    )
    return rows | {"image": anomalous.numpy(), "mask": masks.numpy()}


def derived_seed(*parts: object) -> int:
    """A seed below 2^63 from anything that prints."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
