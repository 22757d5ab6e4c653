"""Adaptive Denoising Steps (Sec. 3.3) and Spatial-Adaptive Feature Fusion (Sec. 3.4), as a plain loop over a batch.

This is the reference: written to be read beside the paper, and the oracle for tests of the faster engine.

Shapes: B images, C latent channels, H W latent grid, h w token grid, R image side, S inference steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glad_core import schedule, scoring

if TYPE_CHECKING:
    from glad_core.bundle.model import Model

StopReason = Literal["difference", "min_step", "none"]


@dataclass
class Step:
    """What one pass of the loop did to the images ``rows`` (indices into the batch); for tests and for inspection."""

    rows: Tensor
    t: Tensor
    eps: Tensor
    x0_hat: Tensor
    x0: Tensor
    latents: Tensor
    compared: Tensor
    x0_true: Tensor | None = None
    map_bhw: Tensor | None = None
    score: Tensor | None = None


@dataclass
class Reconstruction:
    """The result for a batch: ``latents`` [B, C, H, W] at step 0, to be decoded, and those of the input."""

    latents: Tensor
    input_latents: Tensor
    stop_step: list[int | None]
    stop_reason: list[StopReason]
    steps: list[list[tuple[int, float]]] = field(default_factory=list)


def reconstruct(
    model: Model,
    images_B3RR: Tensor,
    eps_BCHW: Tensor,
    posterior_noise_BCHW: Tensor,
    *,
    prompts_BLD: Tensor | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Reconstruction:
    """Rebuild images as they would look if they were good (Fig. 2).

    Args:
        model: the bundle.
        images_B3RR: x^a as pixels, [B, 3, R, R] in [-1, 1].
        eps_BCHW: ε, the noise added to every image, standard normal; the same ε serves all its timesteps.
        posterior_noise_BCHW: standard normal noise of the VAE's posterior sample.
        prompts_BLD: the UNet's condition for every image; the bundle's only prompt if None.
        on_step: called after every pass of the loop.

    Returns:
        Latents, stop steps and step scores of the batch.
    """
    s = model.settings
    alphas = model.alphas
    batch = images_B3RR.shape[0]
    z = encode(model, images_B3RR, posterior_noise_BCHW)
    cond = model.prompt_cond.expand(batch, -1, -1) if prompts_BLD is None else prompts_BLD
    if s.profile == "fast":
        x0_hat = one_call(model, z, eps_BCHW, cond)
        return Reconstruction(x0_hat, z, [None] * batch, ["none"] * batch, [[] for _ in range(batch)])

    ts = torch.tensor(schedule.timesteps(s.start_step, s.inference_steps), device=z.device)
    stride = s.start_step // s.inference_steps
    start = s.start_step if s.noise_index == "T" else s.start_step - 1
    x = schedule.add_noise(alphas, z, eps_BCHW, torch.full((batch,), min(start, len(alphas) - 1), device=z.device))

    k = torch.zeros(batch, dtype=torch.long, device=z.device)  # index in `ts`, for each image
    searching = torch.full((batch,), s.delta > 0, device=z.device)  # its adaptive step is not yet known
    result = Reconstruction(x, z, [None] * batch, ["none"] * batch, [[] for _ in range(batch)])

    while (k < len(ts)).any():
        rows = (k < len(ts)).nonzero()[:, 0]
        t = ts[k[rows]]
        eps_hat = predict_noise(model, x[rows], t, cond[rows])
        x0_hat = schedule.predict_x0(alphas, x[rows], eps_hat, t)  # x̂_{t→0}, Eq. 2
        x0 = x0_hat.clone()
        step = Step(rows, t, eps_hat, x0_hat, x0, x0, searching[rows].clone())
        again = torch.zeros_like(t, dtype=torch.bool)

        if searching[rows].any():
            live = searching[rows].nonzero()[:, 0]
            images = rows[live]
            # x^a_{t→0}: clean prediction of the directly noised input. The released code reuses ε_θ(x̂_t, t) for it.
            x_a = schedule.add_noise(alphas, z[images], eps_BCHW[images], t[live])
            eps_a = eps_hat[live] if s.variant == "official" else predict_noise(model, x_a, t[live], cond[images])
            x0_true = schedule.predict_x0(alphas, x_a, eps_a, t[live])
            map_bhw, score = compare(model, x0_true, x0_hat[live])
            for image, timestep, value in zip(images.tolist(), t[live].tolist(), score.tolist(), strict=True):
                result.steps[image].append((timestep, value))

            differs = score > torch.tensor(s.delta, dtype=score.dtype, device=score.device)
            stops = differs | (t[live] < s.min_step)
            fused = fuse(map_bhw, x0_hat[live], x0_true)
            if s.variant == "official":
                # Below min_step without a difference, or without SAFF, the input itself continues unblended.
                blend = differs if s.saff else torch.zeros_like(differs)
                chosen = torch.where(blend.view(-1, 1, 1, 1), fused, x0_true)
                x0[live] = torch.where(stops.view(-1, 1, 1, 1), chosen, x0_hat[live])
            elif stops.any():
                # Eq. 7: noise the fused features with the same ε and denoise from t; without SAFF from x^a_{t+n}.
                back = 0 if s.saff else round(s.restart_margin / stride)
                restart = images[stops]
                k[restart] = (k[restart] - back).clamp(min=0)
                clean = fused[stops] if s.saff else z[restart]
                x[restart] = schedule.add_noise(alphas, clean, eps_BCHW[restart], ts[k[restart]])
                again[live[stops]] = True

            for row in stops.nonzero()[:, 0].tolist():
                image = int(images[row])
                result.stop_step[image] = int(t[live][row])
                result.stop_reason[image] = "difference" if bool(differs[row]) else "min_step"
            searching[images[stops]] = False
            step.x0_true, step.map_bhw, step.score = x0_true, map_bhw, score

        go = ~again
        x[rows[go]] = schedule.ddim_step(alphas, x0[go], eps_hat[go], t[go] - stride)  # Eq. 3
        k[rows[go]] += 1
        if on_step is not None:
            step.x0, step.latents = x0, x[rows].clone()
            on_step(step)

    result.latents = x
    return result


def one_call(model: Model, z_BCHW: Tensor, eps_BCHW: Tensor, cond_BLD: Tensor) -> Tensor:
    """Profile `fast`, not in the paper: the clean prediction of the input noised to T, by one UNet call (Eq. 1-2)."""
    t = torch.full((len(z_BCHW),), min(model.settings.start_step, len(model.alphas) - 1), device=z_BCHW.device)
    x_t = schedule.add_noise(model.alphas, z_BCHW, eps_BCHW, t)
    return schedule.predict_x0(model.alphas, x_t, predict_noise(model, x_t, t, cond_BLD), t)


def compare(model: Model, x0_true_BCHW: Tensor, x0_hat_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The difference between the two clean predictions (Sec. 3.3): token map [B, h, w] and step score [B].

    The released code compares only the last block, all in float16; the paper compares all four blocks (Sec. 3.6).
    Both pass the decoded images to the features without normalisation, in about [-1, 1].
    """
    s = model.settings
    images = decode(model, torch.cat([x0_true_BCHW, x0_hat_BCHW]))
    with model.precision():
        both = model.features(images, last=s.variant == "official")
    dtype = torch.float16 if s.variant == "official" else torch.float32
    pairs = [tokens.to(dtype).chunk(2) for tokens in both]
    map_bhw = scoring.token_map(
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        match=s.match,
        radius=s.window,
        bidirectional=False,
    )
    return map_bhw, scoring.image_score(map_bhw, s.step_score_top_k)


def fuse(map_bhw: Tensor, x0_hat_BCHW: Tensor, x0_true_BCHW: Tensor) -> Tensor:
    """The bracket of Eq. 7: m·x̂_{t→0} + (1 - m)·x^a_{t→0} with m = sigmoid(anomaly map), so m >= 1/2.

    If the token grid is not the latent grid, m is resized (bilinear); the released code cannot run then.
    """
    m = torch.sigmoid(map_bhw)[:, None].to(x0_hat_BCHW.dtype)
    if m.shape[-2:] != x0_hat_BCHW.shape[-2:]:
        m = F.interpolate(m, size=x0_hat_BCHW.shape[-2:], mode="bilinear", align_corners=True)
    return m * x0_hat_BCHW + (1 - m) * x0_true_BCHW


def predict_noise(model: Model, x_t_BCHW: Tensor, t_B: Tensor, cond_BLD: Tensor) -> Tensor:
    """ε_θ(x_t, t) with classifier-free guidance: ε_u + w·(ε_c - ε_u). At w = 1 there is no unconditional call."""
    w = model.settings.guidance_scale
    x, t, prompts = x_t_BCHW, t_B, cond_BLD
    if w != 1:
        x, t = torch.cat([x, x]), torch.cat([t, t])
        prompts = torch.cat([model.prompt_uncond.expand(len(t_B), -1, -1), cond_BLD])
    with model.precision():
        eps = model.unet(x, t, encoder_hidden_states=prompts).sample.to(x.dtype)
    if w == 1:
        return eps
    eps_uncond, eps_cond = eps.chunk(2)
    return eps_uncond + w * (eps_cond - eps_uncond)


def encode(model: Model, images_B3RR: Tensor, posterior_noise_BCHW: Tensor) -> Tensor:
    """A sample of the VAE's posterior times its scaling factor, [B, C, H, W]."""
    with model.precision():
        posterior = model.vae.encode(images_B3RR).latent_dist
    mean, std = posterior.mean.to(images_B3RR.dtype), posterior.std.to(images_B3RR.dtype)
    return (mean + std * posterior_noise_BCHW) * model.vae.config.scaling_factor


def decode(model: Model, latents_BCHW: Tensor) -> Tensor:
    """Latents to pixels, [B, 3, R, R] in about [-1, 1], not clamped."""
    with model.precision():
        return model.vae.decode(latents_BCHW / model.vae.config.scaling_factor).sample.to(latents_BCHW.dtype)
