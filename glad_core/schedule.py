"""The diffusion schedule: ᾱ_t and Eq. 1-3 of the paper.

Every function takes one timestep *per image*, because a batch holds images at different steps.

Shapes: B images, C latent channels, H W latent grid; names carry them, as in ``x_BCHW``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alphas_cumprod(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Tensor:
    """ᾱ_t of Stable Diffusion's schedule, β linear in the square root ("scaled_linear" in diffusers).

    Returns:
        float32 [steps], decreasing, in (0, 1).
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def timesteps(start_step: int, inference_steps: int) -> list[int]:
    """The timesteps from start step T down, with "leading" spacing and an offset of 1.

    With T = 1000 these are the timesteps of diffusers' ``DDIMScheduler``. The released code spreads them over T, not
    over the whole schedule, so the first one is (S - 1) * (T // S) + 1, a little below T.

    Args:
        start_step: T, in 1..1000.
        inference_steps: S, in 1..T.
    """
    stride = start_step // inference_steps
    return [k * stride + 1 for k in reversed(range(inference_steps))]


def _alpha_bar(alphas: Tensor, t_B: Tensor, like: Tensor) -> Tensor:
    """ᾱ_t as [B, 1, 1, 1]; ᾱ_0 for a negative t (``set_alpha_to_one=False``)."""
    return alphas.to(like.device)[t_B.to(like.device).clamp(min=0)].to(like.dtype).view(-1, 1, 1, 1)


def add_noise(alphas: Tensor, x0_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Eq. 1: x_t = √ᾱ_t·x_0 + √(1-ᾱ_t)·ε."""
    alpha_bar = _alpha_bar(alphas, t_B, x0_BCHW)
    return alpha_bar.sqrt() * x0_BCHW + (1 - alpha_bar).sqrt() * eps_BCHW


def predict_x0(alphas: Tensor, x_t_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Eq. 2: x_{t→0} = (x_t - √(1-ᾱ_t)·ε_θ) / √ᾱ_t."""
    alpha_bar = _alpha_bar(alphas, t_B, x_t_BCHW)
    return (x_t_BCHW - (1 - alpha_bar).sqrt() * eps_BCHW) / alpha_bar.sqrt()


def ddim_step(alphas: Tensor, x0_BCHW: Tensor, eps_BCHW: Tensor, t_prev_B: Tensor) -> Tensor:
    """Eq. 3 (DDIM, η = 0): x̂_{t-1} = √ᾱ_{t-1}·x̂_{t→0} + √(1-ᾱ_{t-1})·ε_θ; a negative ``t_prev`` means ᾱ_0."""
    return add_noise(alphas, x0_BCHW, eps_BCHW, t_prev_B)
