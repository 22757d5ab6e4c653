"""The recipe that a part of a bundle is trained with: frozen, documented, validated settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glad_core.bundle.settings import FrozenSettings, Precision

Part = Literal["unet", "dino", "vae"]
Optimizer = Literal["adamw", "adamw8bit", "muon"]


class Recipe(FrozenSettings):
    """How a part is trained; the defaults are the released code's for the UNet, except its 8-bit optimiser."""

    steps: int = Field(2000, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="images of one optimiser step, over all workers")
    micro_batch: int | None = Field(None, ge=1, description="images of one pass; gradients accumulate to batch_size")
    learning_rate: float = Field(
        5e-6, gt=0, description="of AdamW, or of Muon (the weights that it leaves to AdamW have a tenth)"
    )
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: 5 % warm-up, then to zero")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW; with Muon there is none")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are cut to this norm")
    blend: bool = Field(
        True, description="mix anomalous and good image by t / 1000, as the released code does; else the paper's Eq. 10"
    )
    anomaly_probability: float = Field(0.5, ge=0, le=1, description="share of images that get a synthetic anomaly")
    foreground_mode: Literal[1, 2, 3] = Field(3, description="anomalies on 1 darker, 2 brighter object, 3 anywhere")
    max_timestep: int = Field(1000, ge=1, le=1000, description="timesteps are drawn below this")
    keep: float = Field(0.01, ge=0, description="weight of staying near the original features in the DINO adaptation")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep an exponential moving average of the weights")
    autocast: Precision = Field("off", description="precision of the networks' matrix products")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    optimizer: Optimizer = Field(
        "adamw", description="adamw8bit needs bitsandbytes and a GPU; muon is for networks trained from nothing"
    )
    seed: int = Field(0, ge=0, description="seed of the order, the anomalies, timesteps and noise")
