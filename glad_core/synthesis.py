"""Synthetic anomalies after MemSeg (Yang et al., 2023).

A Perlin mask gives the position; a texture, or the image with its pieces shuffled, gives the look; β the opacity. Every
image has its own seed, so its anomaly does not depend on its batch.

Shapes: B batch, H W image, M texture pool, n pixels under a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

PERLIN_EXPONENTS = range(6)  # scales 2^0..2^5 along each axis
PERLIN_THRESHOLD = 0.3
TEXTURE_PROBABILITY = 0.5
STRUCTURE_GRID = 8
MAX_BETA = 0.8
MASK_TRIES = 8


def synthesize(
    images_BHW3: Tensor,
    *,
    seeds: Sequence[int],
    textures: Tensor | None = None,
    foreground_BHW: Tensor | None = None,
    probability: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Give images synthetic anomalies: x^a = (1 - m)·x + m·(β·x + (1 - β)·source), β uniform in [0, 0.8].

    Only the pixels under the mask are computed.

    Args:
        images_BHW3: good images, uint8, on the CPU.
        seeds: one per image; the anomaly depends on the seed, the image and the texture pool alone.
        textures: pool of pictures, uint8 [M, H', W', 3]; without it the texture is a turned copy of the image.
        foreground_BHW: bool; anomalies lie on it only.
        probability: chance of an anomaly; the other images are returned unchanged.

    Returns:
        The images, uint8 [B, H, W, 3], and masks, bool [B, H, W]; the mask of an unchanged image is empty.

    Raises:
        ValueError: not one seed per image.
    """
    anomalous = images_BHW3.clone()
    masks = torch.zeros(images_BHW3.shape[:3], dtype=torch.bool)
    for row, (image, seed) in enumerate(zip(images_BHW3, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        if _uniform(generator) >= probability:
            continue
        allowed = None if foreground_BHW is None else foreground_BHW[row]
        masks[row] = _anomaly_mask(image.shape[0], image.shape[1], generator, allowed)
        y, x = masks[row].nonzero(as_tuple=True)
        if not len(y):
            continue
        if _uniform(generator) < TEXTURE_PROBABILITY:
            source = _texture(image, textures, y, x, generator)
        else:
            source = _shuffled_structure(image, y, x, generator)
        source = _recoloured(source, generator)
        beta = MAX_BETA * _uniform(generator)
        mixed = torch.lerp(source.float(), image[y, x].float(), beta)
        anomalous[row, y, x] = mixed.round().to(torch.uint8)
    return anomalous, masks


def perlin(size: tuple[int, int], cells: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Perlin gradient noise, [H, W] in about [-1, 1], with ``cells`` lattice cells along each axis.

    The blend of a pixel's four corners is separable, so the whole field is two matrix products.
    """
    angles = 2 * torch.pi * torch.rand((cells[0] + 1, cells[1] + 1), generator=generator)
    (weight_y, offset_y), (weight_x, offset_x) = (_corner_weights(*axis) for axis in zip(size, cells, strict=True))
    down = offset_y @ angles.cos() @ weight_x.T
    right = weight_y @ angles.sin() @ offset_x.T
    return 2**0.5 * (down + right)


def _corner_weights(size: int, cells: int) -> tuple[Tensor, Tensor]:
    """Weight of each lattice point at each pixel of one axis, and weight times distance, [size, cells + 1] each."""
    position = (torch.arange(size) + 0.5) / size * cells
    cell = position.long()
    f = position - cell
    fade = f**3 * (f * (6 * f - 15) + 10)  # Perlin's quintic
    pixel = torch.arange(size)
    weights, offsets = torch.zeros(2, size, cells + 1)
    weights[pixel, cell], weights[pixel, cell + 1] = 1 - fade, fade
    offsets[pixel, cell], offsets[pixel, cell + 1] = (1 - fade) * f, fade * (f - 1)
    return weights, offsets


def _anomaly_mask(height: int, width: int, generator: torch.Generator, allowed_HW: Tensor | None) -> Tensor:
    """A thresholded, turned Perlin field in the allowed region, bool [H, W]; drawn again while it is empty."""
    for _ in range(MASK_TRIES):
        exponents = torch.randint(len(PERLIN_EXPONENTS), (2,), generator=generator).tolist()
        field = perlin((height, width), (2 ** exponents[0], 2 ** exponents[1]), generator) > PERLIN_THRESHOLD
        y, x = _turned(torch.arange(height)[:, None], torch.arange(width)[None], height, width, generator)
        # Pixels outside the field read a border of False.
        index = y.clamp_(-1, height).add_(1).mul_(width + 2).add_(x.clamp_(-1, width).add_(1)).int()
        mask = F.pad(field, (1, 1, 1, 1)).flatten().index_select(0, index.flatten()).view(height, width)
        if allowed_HW is not None:
            mask &= allowed_HW
        if mask.any():
            break
    return mask


def _turned(y: Tensor, x: Tensor, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where pixels (y, x) of a picture turned by a random angle were before; some lie outside it.

    Whole numbers as float32, because integers are slower here.
    """
    angle = 2 * math.pi * _uniform(generator)
    cos, sin = math.cos(angle), math.sin(angle)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    dy, dx = y - middle_y, x - middle_x
    return (dy * cos + (middle_y - dx * sin)).round_(), (dy * sin + (middle_x + dx * cos)).round_()


def _texture(
    image_HW3: Tensor, textures: Tensor | None, y_n: Tensor, x_n: Tensor, generator: torch.Generator
) -> Tensor:
    """Colours, uint8 [n, 3], at these pixels of a texture: from the pool, or the image itself turned and mirrored."""
    height, width = image_HW3.shape[:2]
    if textures is not None:
        texture = textures[int(torch.randint(len(textures), (1,), generator=generator))]
        return texture[y_n * texture.shape[0] // height, x_n * texture.shape[1] // width]
    y, x = _turned(y_n, width - 1 - x_n, height, width, generator)
    return image_HW3[y.long() % height, x.long() % width]


def _shuffled_structure(image_HW3: Tensor, y_n: Tensor, x_n: Tensor, generator: torch.Generator) -> Tensor:
    """Colours, uint8 [n, 3], at these pixels of the image with its 8 x 8 pieces shuffled."""
    height, width = image_HW3.shape[:2]
    piece_y, piece_x = -(-height // STRUCTURE_GRID), -(-width // STRUCTURE_GRID)
    order = torch.randperm(STRUCTURE_GRID**2, generator=generator)
    piece = order[y_n // piece_y * STRUCTURE_GRID + x_n // piece_x]
    y = piece // STRUCTURE_GRID * piece_y + y_n % piece_y
    x = piece % STRUCTURE_GRID * piece_x + x_n % piece_x
    return image_HW3[y.clamp(max=height - 1), x.clamp(max=width - 1)]


def _recoloured(colours_n3: Tensor, generator: torch.Generator) -> Tensor:
    """Apply three of MemSeg's colour changes in random order, uint8 [n, 3]; none of them looks at neighbours."""
    strength = torch.rand(6, generator=generator).tolist()
    changes = [
        lambda x: TF.adjust_brightness(x, 0.6 + 0.8 * strength[0]),
        lambda x: TF.adjust_contrast(x, 0.5 + strength[1]),
        lambda x: TF.adjust_saturation(x, 0.5 + strength[2]),
        lambda x: TF.adjust_hue(x, strength[3] - 0.5),
        lambda x: TF.posterize(x, 2 + int(4 * strength[4])),
        lambda x: TF.solarize(x, 128 + 127 * strength[5]),
        TF.autocontrast,
        TF.equalize,
    ]
    picture = colours_n3.T[:, None].contiguous()
    for pick in torch.randperm(len(changes), generator=generator)[:3].tolist():
        picture = changes[pick](picture)
    return picture[:, 0].T


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
