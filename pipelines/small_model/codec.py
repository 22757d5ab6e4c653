"""The small model's codec: a diffusers AutoencoderKL whose encoder starts as the best linear code.

A randomly initialised autoencoder of this size takes long to become as good as a PCA of 8 x 8 patches; this one starts
there. Legend: C channels, L latent channels.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from glad_core.images import to_tensor
from glad_core.training.muon import Optimizers, step_all
from pipelines.demo.boards import DEFECTS
from pipelines.small_model.pictures import batches, board_picture

log = logging.getLogger(__name__)

LATENTS = 24
WIDTHS = (16, 32, 64, 96)
POSTERIOR_STD = 0.02  # of whitened latents; fixed and small, so that samples of the posterior stay close to its mean
CONSTANT = 8.0  # see `start_as_pca`


def create_codec() -> AutoencoderKL:
    """The untrained codec: 128 x 128 x 3 to 16 x 16 x L; every residual branch starts at zero."""
    codec = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENTS,
        # One group: narrow groups would erase the brightness and contrast of their few channels.
        norm_num_groups=1,
        sample_size=128,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    for name, module in codec.named_modules():
        if name.endswith("conv2"):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return codec


@torch.no_grad()
def start_as_pca(codec: AutoencoderKL, images: Tensor) -> None:
    """Make the encoder the whitened PCA of 8 x 8 patches of ``images``, exactly but for the last norm's rounding.

    Each stride-2 convolution gathers 2 x 2 pixels and keeps as many principal axes as it has channels. The last norm
    and SiLU are made linear: each component u travels as a pair (u, -u), silu(u) - silu(-u) = u, and a constant pair
    far larger than all components keeps the norm's divisor from depending on the picture.
    """
    encoder = codec.encoder
    _set_conv(encoder.conv_in, torch.eye(3)[:, :, None, None], tap=1)
    x = images
    for level in range(3):
        block = encoder.down_blocks[level]
        if level:
            _set_conv(block.resnets[0].conv_shortcut, torch.eye(x.shape[1])[:, :, None, None])
        patches = F.unfold(x, 2, stride=2).transpose(1, 2).flatten(0, 1)
        _, axes = torch.linalg.eigh(patches.T @ patches)
        kept = min(WIDTHS[level], patches.shape[1])
        weight = axes[:, -kept:].T.reshape(kept, x.shape[1], 2, 2)
        _set_conv(block.downsamplers[0].conv, weight)
        x = F.conv2d(x, weight, stride=2)
    tokens = x.permute(0, 2, 3, 1).flatten(0, 2)
    mean = tokens.mean(0)
    variance, axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))
    whiten = (axes[:, -LATENTS:] / variance[-LATENTS:].sqrt()).T.flip(0)  # [L, C]
    signs = torch.cat([whiten, -whiten, torch.zeros(2, x.shape[1])])
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    _set_conv(shortcut, signs[:, :, None, None])
    shortcut.bias[: len(signs)] = torch.cat([-whiten @ mean, whiten @ mean, torch.tensor([CONSTANT, -CONSTANT])])
    nn.init.constant_(encoder.conv_norm_out.weight, math.sqrt((2 * CONSTANT**2 + 2 * LATENTS) / WIDTHS[3]))
    pairs = torch.cat([torch.eye(LATENTS), -torch.eye(LATENTS)], dim=1)
    _set_conv(encoder.conv_out, pairs[:, :, None, None], tap=1)
    _set_conv(codec.quant_conv, torch.eye(2 * LATENTS)[:, :, None, None])
    _set_conv(codec.post_quant_conv, torch.eye(LATENTS)[:, :, None, None])


def _set_conv(conv: nn.Conv2d, weight: Tensor, tap: int = 0) -> None:
    """Set ``conv`` to ``weight`` [out, in, h, w] from tap (``tap``, ``tap``) on, zero elsewhere."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    outputs, inputs, height, width = weight.shape
    conv.weight[:outputs, :inputs, tap : tap + height, tap : tap + width] = weight


def _picture_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared error, and the error of differences between neighbours, which keeps edges sharp."""
    error = decoded - images
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def train_codec(pool: dict[str, np.ndarray], out: Path, iterations: int = 3000, batch: int = 8) -> None:
    """Train the codec and write it with `save_pretrained`; the caller fixes the thread count.

    The first half trains the decoder alone, the second both ends. The last sixth uses whole pictures, since the
    norms' statistics are taken over the picture.
    """
    torch.manual_seed(0)
    started = time.monotonic()
    codec = create_codec()
    crops, wholes = batches(pool, batch, 64, seed=2), batches(pool, max(1, batch // 4), 128, seed=3)
    start_as_pca(codec, torch.cat([next(crops) for _ in range(1500 // batch)]))
    decoder = Optimizers(codec.decoder, iterations, outer=[codec.decoder.conv_out])
    encoder = Optimizers(codec.encoder, iterations // 2, outer=[codec.encoder.conv_in], scale=0.05)
    for step in range(iterations):
        images = next(crops if step < iterations * 5 // 6 else wholes)
        both = step >= iterations // 2
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(both):
                z = codec.encode(images).latent_dist.mode().float()
            decoded = codec.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        # Without this pull to 0, the latents would grow until the added noise no longer matters.
        loss = _picture_loss(decoded, images) + 2e-3 * z.square().mean()
        step_all([decoder, encoder] if both else [decoder], loss)
        if (step + 1) % 100 == 0:
            log.info(
                "codec %d/%d: loss %.4f, held-out good board %.2f dB, %.0f s",
                step + 1,
                iterations,
                float(loss.detach()),
                psnr(codec, "good", 4),
                time.monotonic() - started,
            )
    whiten(codec, pool)
    codec.save_pretrained(out)
    report = ", ".join(f"{split} {psnr(codec, split, 12):.2f}" for split in ("good", *DEFECTS))
    log.info("codec: round trip of held-out boards in dB: %s", report)


@torch.no_grad()
def whiten(codec: AutoencoderKL, pool: dict[str, np.ndarray], pictures: int = 300) -> None:
    """Fold mean 0 and standard deviation 1 of every latent channel into the two 1 x 1 convolutions, exactly.

    Measured on whole pictures, three quarters of them boards. The posterior's width becomes the constant
    `POSTERIOR_STD`.
    """
    rng = np.random.default_rng(4)
    chosen = [pool["boards"][rng.integers(len(pool["boards"]))] for _ in range(pictures * 3 // 4)]
    chosen += [pool["photos"][rng.integers(len(pool["photos"]))] for _ in range(pictures // 4)]
    z = torch.cat([codec.encode(to_tensor(chosen[k : k + 25])).latent_dist.mode() for k in range(0, len(chosen), 25)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    quant, post_quant = codec.quant_conv, codec.post_quant_conv
    quant.weight[:LATENTS] /= std[:, None, None, None]
    quant.bias[:LATENTS] = (quant.bias[:LATENTS] - mean) / std
    quant.weight[LATENTS:] = 0
    quant.bias[LATENTS:] = 2 * math.log(POSTERIOR_STD)
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(codec: AutoencoderKL, split: str, count: int, seed: int = 5) -> float:
    """Mean PSNR in dB of the round trip of boards that no training uses."""
    images = to_tensor([board_picture(index, seed, split) for index in range(count)])
    decoded = codec.decode(codec.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return float((-10 * ((decoded - images) / 2).square().flatten(1).mean(1).log10()).mean())
