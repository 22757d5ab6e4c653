"""Synthetic anomalies after MemSeg (Yang et al., 2023), and the foreground they are confined to.

A Perlin mask decides where; a texture, or the image with its pieces shuffled, decides what; β how strongly. Every
image draws from its own seed, so what happens to it does not depend on its batch.

Shapes: B batch, H W image, M texture pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

ForegroundMode = Literal[1, 2, 3]

PERLIN_EXPONENTS = range(6)  # scales 2^0..2^5 along each axis
PERLIN_THRESHOLD = 0.3
TEXTURE_PROBABILITY = 0.5
STRUCTURE_GRID = 8
MAX_BETA = 0.8
MASK_TRIES = 8


def synthesize(
    images_B3HW: Tensor,
    *,
    seeds: Sequence[int],
    textures: Tensor | None = None,
    foreground_BHW: Tensor | None = None,
    probability: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Give images synthetic anomalies: x^a = (1 - m)·x + m·(β·x + (1 - β)·source), β uniform in [0, 0.8].

    Args:
        images_B3HW: good images, float32 in [-1, 1], on the CPU.
        seeds: one per image; all that happens to an image follows from its seed, itself and the texture pool.
        textures: pool of pictures, uint8 [M, H', W', 3]; without one an augmented copy of the image is the texture.
        foreground_BHW: bool; anomalies stay on it.
        probability: chance of an anomaly; the other images come back unchanged.

    Returns:
        The images, float32 [B, 3, H, W] in [-1, 1], and masks, float32 [B, 1, H, W] of 0 and 1 (all 0: unchanged).

    Raises:
        ValueError: not one seed per image.
    """
    anomalous, masks = [], []
    for row, (image, seed) in enumerate(zip(images_B3HW, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(image.shape[-2:])
        if _uniform(generator) < probability:
            mask = _anomaly_mask(image.shape[-2:], generator, None if foreground_BHW is None else foreground_BHW[row])
            if _uniform(generator) < TEXTURE_PROBABILITY:
                source = _texture(image, textures, generator)
            else:
                source = _shuffled_structure(image, generator)
            beta = MAX_BETA * _uniform(generator)
            image = (1 - mask) * image + mask * (beta * image + (1 - beta) * source)
        anomalous.append(image)
        masks.append(mask[None])
    return torch.stack(anomalous), torch.stack(masks)


def perlin(size: tuple[int, int], cells: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Perlin gradient noise, [H, W] in about [-1, 1], with ``cells`` lattice cells along each axis."""
    angles = 2 * torch.pi * torch.rand((cells[0] + 1, cells[1] + 1), generator=generator)
    gradients = torch.stack([angles.cos(), angles.sin()], dim=-1)
    y = (torch.arange(size[0]) + 0.5) / size[0] * cells[0]
    x = (torch.arange(size[1]) + 0.5) / size[1] * cells[1]
    row, column = y.long(), x.long()
    fy, fx = (y - row)[:, None], (x - column)[None, :]

    def corner(down: int, right: int) -> Tensor:
        gradient = gradients[row + down][:, column + right]
        return gradient[..., 0] * (fy - down) + gradient[..., 1] * (fx - right)

    fade_y, fade_x = (f**3 * (f * (6 * f - 15) + 10) for f in (fy, fx))  # Perlin's quintic
    top = torch.lerp(corner(0, 0), corner(0, 1), fade_x.expand(size))
    bottom = torch.lerp(corner(1, 0), corner(1, 1), fade_x.expand(size))
    return 2**0.5 * torch.lerp(top, bottom, fade_y.expand(size))


def foreground(images_B3HW: Tensor, mode: ForegroundMode) -> Tensor:
    """Where the object is, bool [B, H, W]: by Otsu on grey 1 darker, 2 brighter than the background; 3 everywhere."""
    if mode == 3:
        return torch.ones(images_B3HW.shape[0], *images_B3HW.shape[-2:], dtype=torch.bool)
    grey = ((TF.rgb_to_grayscale(images_B3HW)[:, 0] + 1) * 127.5).round().clamp(0, 255)
    threshold = torch.stack([otsu(image) for image in grey]).view(-1, 1, 1)
    return grey <= threshold if mode == 1 else grey > threshold


def otsu(grey_HW: Tensor) -> Tensor:
    """Otsu's threshold of one grey image with values 0..255: the level (scalar) that splits it best into <= and >."""
    counts = torch.bincount(grey_HW.flatten().long(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64, device=counts.device)
    below, total = counts.cumsum(0), counts.sum()
    mean_below = (counts * levels).cumsum(0)
    mean_all = mean_below[-1]
    # Between-class variance times total²; NaN where a class is empty.
    between = (mean_all * below - mean_below * total) ** 2 / (below * (total - below))
    return between.nan_to_num(nan=-1.0, posinf=-1.0).argmax().to(grey_HW.dtype)


def object_mask(images_B3HW: Tensor, mode: ForegroundMode, sigma: float = 6.0) -> Tensor:
    """The softened foreground that multiplies the final map, float [B, H, W] in [0, 1].

    Gaussian (σ, cut at 4σ), everything above 0 set to 1, Gaussian again: wider than the object, with soft edges.
    """
    taps = 2 * int(4 * sigma + 0.5) + 1
    mask = foreground(images_B3HW, mode).to(images_B3HW.dtype)[:, None]
    wide = (TF.gaussian_blur(mask, [taps, taps], [sigma, sigma]) > 0).to(mask.dtype)
    return TF.gaussian_blur(wide, [taps, taps], [sigma, sigma])[:, 0].to(images_B3HW.device)


def _anomaly_mask(size: tuple[int, int], generator: torch.Generator, allowed_HW: Tensor | None) -> Tensor:
    """A thresholded, rotated Perlin field on the allowed region, [H, W] of 0 and 1; redrawn while it is empty."""
    for _ in range(MASK_TRIES):
        exponents = torch.randint(len(PERLIN_EXPONENTS), (2,), generator=generator).tolist()
        field = perlin(size, (2 ** exponents[0], 2 ** exponents[1]), generator)
        angle = 360 * _uniform(generator) - 180
        mask = (
            TF.rotate(field[None], angle, interpolation=v2.InterpolationMode.BILINEAR)[0] > PERLIN_THRESHOLD
        ).float()
        if allowed_HW is not None:
            mask = mask * allowed_HW
        if mask.any():
            break
    return mask


def _texture(image_3HW: Tensor, textures: Tensor | None, generator: torch.Generator) -> Tensor:
    """A texture from the pool, or the image turned, mirrored and recoloured, at the image's size."""
    size = list(image_3HW.shape[-2:])
    if textures is not None:
        pick = int(torch.randint(len(textures), (1,), generator=generator))
        picked = textures[pick].permute(2, 0, 1).float() / 127.5 - 1
        picked = TF.resize(picked, size, antialias=True)
        return _augmented(picked, generator)
    turned = TF.rotate(image_3HW, 360 * _uniform(generator), interpolation=v2.InterpolationMode.BILINEAR)
    return _augmented(TF.horizontal_flip(turned), generator)


def _shuffled_structure(image_3HW: Tensor, generator: torch.Generator) -> Tensor:
    """The image, recoloured, cut into 8 x 8 pieces that change places (sides are padded to a multiple of 8)."""
    height, width = image_3HW.shape[-2:]
    pad_y, pad_x = -height % STRUCTURE_GRID, -width % STRUCTURE_GRID
    image = F.pad(_augmented(image_3HW, generator)[None], (0, pad_x, 0, pad_y), mode="replicate")[0]
    piece_y, piece_x = image.shape[-2] // STRUCTURE_GRID, image.shape[-1] // STRUCTURE_GRID
    pieces = image.unfold(1, piece_y, piece_y).unfold(2, piece_x, piece_x).flatten(1, 2)
    order = torch.randperm(STRUCTURE_GRID**2, generator=generator)
    grid = pieces[:, order].view(3, STRUCTURE_GRID, STRUCTURE_GRID, piece_y, piece_x)
    return grid.permute(0, 1, 3, 2, 4).reshape(image.shape)[:, :height, :width]


def _augmented(image_3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Three of MemSeg's colour changes in random order, [3, H, W] in [-1, 1]."""
    image = (image_3HW + 1) / 2
    strength = torch.rand(6, generator=generator).tolist()
    changes = [
        lambda x: TF.adjust_brightness(x, 0.6 + 0.8 * strength[0]),
        lambda x: TF.adjust_contrast(x, 0.5 + strength[1]),
        lambda x: TF.adjust_saturation(x, 0.5 + strength[2]),
        lambda x: TF.adjust_hue(x, strength[3] - 0.5),
        lambda x: TF.adjust_sharpness(x, 2 * strength[4]),
        lambda x: TF.solarize(x, 0.5 + 0.5 * strength[5]),
        TF.autocontrast,
        lambda x: TF.equalize((x * 255).to(torch.uint8)) / 255,
    ]
    for pick in torch.randperm(len(changes), generator=generator)[:3].tolist():
        image = changes[pick](image.clamp(0, 1))
    return image.clamp(0, 1) * 2 - 1


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
