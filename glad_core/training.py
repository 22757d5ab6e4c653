"""The Anomaly-oriented Training Paradigm (Sec. 3.5): the loss, and the loop that one worker runs.

Shapes: B batch, C latent channels, H W latent grid, R image side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from glad_core import schedule, synthesis
from glad_core.muon import muon_and_adamw


class Recipe(BaseModel):
    """How the UNet is fine-tuned; the defaults are the released code's (8-bit AdamW aside)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(2000, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="images of one optimiser step")
    learning_rate: float = Field(5e-6, gt=0)
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: 5 % warm-up, then to zero")
    weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    blend: bool = Field(
        True, description="mix x^a with x by t / 1000 before the loss (released code), else Eq. 10 as is"
    )
    anomaly_probability: float = Field(0.5, ge=0, le=1, description="share of images that get a synthetic anomaly")
    foreground_mode: Literal[1, 2, 3] = Field(3, description="anomalies on 1 darker, 2 brighter object, 3 anywhere")
    max_timestep: int = Field(1000, ge=1, le=1000, description="timesteps are drawn below this")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep an exponential moving average of the weights")
    autocast: Literal["off", "bf16", "fp16"] = Field("off", description="precision of the UNet's matrix products")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for networks trained from nothing")
    seed: int = Field(0, ge=0)


@dataclass
class TrainState:
    """All a resumed run needs: the networks' weights, the optimiser, and how many steps are done.

    Everything random in a step comes from (seed, step), so no generator state is kept.
    """

    unet: UNet2DConditionModel
    optimizers: Sequence[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    ema: EMAModel | None
    step: int = 0

    @classmethod
    def start(cls, unet: UNet2DConditionModel, recipe: Recipe) -> TrainState:
        """A fresh state around ``unet`` (whose parameters become trainable)."""
        unet.requires_grad_(True).train()
        optimizers: Sequence[torch.optim.Optimizer]
        if recipe.optimizer == "muon":
            optimizers = muon_and_adamw(unet, recipe.learning_rate, [unet.conv_in, unet.conv_out])
        else:
            optimizers = [
                torch.optim.AdamW(unet.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
            ]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        ema = EMAModel(unet.parameters(), decay=recipe.ema_decay, use_ema_warmup=True) if recipe.ema_decay else None
        device = next(unet.parameters()).device.type
        return cls(unet, optimizers, torch.amp.GradScaler(device, enabled=recipe.autocast == "fp16"), ema)

    def state_dict(self) -> dict[str, Any]:
        return {
            "unet": self.unet.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["unet"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]

    def finish(self) -> UNet2DConditionModel:
        """The trained UNet (the averaged weights where an average was kept), ready for inference."""
        if self.ema is not None:
            self.ema.copy_to(self.unet.parameters())
        return self.unet.requires_grad_(False).eval()


def fine_tune(
    state: TrainState,
    vae: AutoencoderKL,
    alphas: Tensor,
    prompt_1LD: Tensor,
    load_images: Callable[[list[int]], Tensor],
    count: int,
    recipe: Recipe,
    *,
    textures: Tensor | None = None,
) -> Iterator[float]:
    """Run the steps that are left, yielding the loss after each; the caller logs, saves ``state``, or stops.

    Args:
        load_images: indices below ``count`` to good images, float32 [B, 3, R, R] in [-1, 1].
        count: number of good images.
        textures: pool of texture images for the synthesis, float32 [M, 3, R, R] in [-1, 1]; the images
            themselves serve when None.
    """
    device = next(state.unet.parameters()).device
    autocast_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[recipe.autocast]
    clean = clean_posteriors(vae, load_images, count, recipe.batch_size)
    while state.step < recipe.steps:
        indices, seeds = _sampled(recipe, state.step, count)
        normal = load_images(indices)
        foreground = synthesis.foreground(normal, recipe.foreground_mode) if recipe.foreground_mode != 3 else None
        anomalous, _ = synthesis.synthesize(
            normal, seeds=seeds, textures=textures, foreground_BHW=foreground, probability=recipe.anomaly_probability
        )
        generator = torch.Generator().manual_seed(_derived_seed(recipe.seed, "noise", state.step))
        with torch.no_grad():
            mean, std = (part[indices].to(device) for part in clean)
            x, x_a = encode_pair(vae, mean, std, normal, anomalous, generator)
        t = torch.randint(0, recipe.max_timestep, (len(indices),), generator=generator).to(device)
        eps = torch.randn(x.shape, generator=generator).to(device)

        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor(recipe, state.step)
        with torch.autocast(device.type, autocast_dtype, enabled=recipe.autocast != "off"):
            loss = atp_loss(state.unet, alphas, x_a, x, eps, t, prompt_1LD, blend=recipe.blend)
        state.scaler.scale(loss).backward()
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(state.unet.parameters(), recipe.max_grad_norm)
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.step(state.unet.parameters())
        state.step += 1
        yield loss.item()


@torch.no_grad()
def clean_posteriors(
    vae: AutoencoderKL, load_images: Callable[[list[int]], Tensor], count: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Mean and std of the VAE's posterior of every good image, [N, C, H, W] each; once is enough, the VAE is frozen."""
    parts = []
    for start in range(0, count, batch_size):
        images = load_images(list(range(start, min(start + batch_size, count))))
        posterior = vae.encode(images.to(vae.device)).latent_dist
        parts.append((posterior.mean.cpu(), posterior.std.cpu()))
    return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])


def encode_pair(
    vae: AutoencoderKL,
    mean_BCHW: Tensor,
    std_BCHW: Tensor,
    normal_B3RR: Tensor,
    anomalous_B3RR: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Latents of good images, from their posteriors, and of their anomalous twins, with the same posterior noise.

    The released code shares the noise too. Images left as they are share the latents and are not encoded again.
    """
    noise = torch.randn(mean_BCHW.shape, generator=generator).to(mean_BCHW.device)
    x = (mean_BCHW + std_BCHW * noise) * vae.config.scaling_factor
    x_a = x.clone()
    changed = (anomalous_B3RR != normal_B3RR).flatten(1).any(dim=1)
    if changed.any():
        posterior = vae.encode(anomalous_B3RR[changed].to(mean_BCHW.device)).latent_dist
        changed = changed.to(mean_BCHW.device)
        x_a[changed] = (posterior.mean + posterior.std * noise[changed]) * vae.config.scaling_factor
    return x, x_a


def alpha_blend(anomalous_BCHW: Tensor, normal_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The released code's blend: α·x^a + (1 - α)·x with α = t / 1000, less anomaly the smaller the timestep."""
    alpha = (t_B.to(anomalous_BCHW.dtype) / 1000).view(-1, 1, 1, 1)
    return alpha * anomalous_BCHW + (1 - alpha) * normal_BCHW


def atp_target(alphas: Tensor, anomalous_BCHW: Tensor, normal_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Eq. 9: ε - √ᾱ_t/√(1-ᾱ_t)·(x^a - x), what the UNet shall predict; computed in float64, given in float32.

    At t near 0 the factor reaches about 34, hence the double precision (as in the released code).
    """
    alpha_bar = alphas.to(t_B.device)[t_B].double().view(-1, 1, 1, 1)
    factor = (alpha_bar / (1 - alpha_bar)).sqrt()
    return (eps_BCHW.double() - factor * (anomalous_BCHW.double() - normal_BCHW.double())).float()


def atp_loss(
    unet: UNet2DConditionModel,
    alphas: Tensor,
    anomalous_BCHW: Tensor,
    normal_BCHW: Tensor,
    eps_BCHW: Tensor,
    t_B: Tensor,
    prompt_1LD: Tensor,
    *,
    blend: bool,
) -> Tensor:
    """Eq. 10 as a mean squared error, a scalar; ``blend`` first mixes x^a with x (`alpha_blend`, the released code)."""
    if blend:
        anomalous_BCHW = alpha_blend(anomalous_BCHW, normal_BCHW, t_B)
    target = atp_target(alphas, anomalous_BCHW, normal_BCHW, eps_BCHW, t_B)
    noisy = schedule.add_noise(alphas, anomalous_BCHW, eps_BCHW, t_B)
    prediction = unet(noisy, t_B, encoder_hidden_states=prompt_1LD.expand(len(t_B), -1, -1)).sample
    return F.mse_loss(prediction.float(), target)


def lr_factor(recipe: Recipe, step: int) -> float:
    """Multiplier of the learning rate at ``step``."""
    if recipe.lr_schedule == "constant":
        return 1.0
    warm_up = max(1, recipe.steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, recipe.steps - warm_up)))


def _sampled(recipe: Recipe, step: int, count: int) -> tuple[list[int], list[int]]:
    """Image indices of a step and a synthesis seed for each: shuffled epochs, from (seed, position) alone."""
    indices, seeds = [], []
    orders: dict[int, list[int]] = {}
    for position in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(_derived_seed(recipe.seed, "order", epoch))
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        index = orders[epoch][place]
        indices.append(index)
        seeds.append(_derived_seed(recipe.seed, "anomaly", epoch, index))
    return indices, seeds


def _derived_seed(*parts: object) -> int:
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
