"""The Anomaly-oriented Training Paradigm (Sec. 3.5): the loss, and the loop that one worker runs.

Shapes: B batch, C latent channels, H W latent grid, R image side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from glad_core import schedule


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
