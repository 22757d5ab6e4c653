"""DINO features through timm: tokens of several blocks, at any input size divisible by the patch.

Shapes: B batch, N tokens (without class and register tokens), D embedding width, g tokens along one side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from glad_core.errors import GladError

NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)?")  # timm's architecture, and a tag of its weights
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def create_vit(architecture: str, *, pretrained: bool = False, **args: Any) -> VisionTransformer:
    """A frozen timm ViT without its classifier, e.g. ``vit_base_patch8_224.dino`` (the paper's, Sec. 4.2).

    Raises:
        GladError: timm itself does not know the name, or it is not a plain ``VisionTransformer``.
    """
    # Of names with a colon or a slash timm asks the hub or reads folders.
    if not NAME.fullmatch(architecture) or not timm.is_model(architecture):
        raise GladError(f"timm has no model {architecture!r}: choose one of timm.list_models('vit*')")
    try:
        vit = timm.create_model(architecture, pretrained=pretrained, **{"num_classes": 0, **args})
    except RuntimeError as error:
        if "Invalid pretrained tag" not in str(error):
            raise
        raise GladError(f"timm has no weights {architecture!r}: choose one of timm.list_pretrained('vit*')") from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise GladError(f"'{architecture}' is a {type(vit).__name__}; GLAD needs a timm VisionTransformer (vit_*)")
    return vit.eval().requires_grad_(False)


def used_blocks(vit: VisionTransformer) -> list[int]:
    """The four blocks compared, counted from 1: 3, 6, 9, 12 of a 12-block ViT (Sec. 3.6), evenly spread otherwise."""
    depth = len(vit.blocks)
    return sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})


def position_embedding(vit: VisionTransformer, grid: int) -> Tensor:
    """The position table for a ``grid`` x ``grid`` image, [1, prefix + grid², D].

    As in DINO's own code: bicubic without antialiasing, sampled with the scale factor (g + 0.1) / g0. The scale
    determines the sampling positions, so resizing to a given size, as timm does, gives other numbers.
    """
    table = vit.pos_embed
    assert table is not None  # create_vit refuses a ViT without one
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    native = round((table.shape[1] - prefix) ** 0.5)
    if grid == native:
        return table
    patches = table[:, prefix:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / native
    patches = F.interpolate(patches.float(), scale_factor=(scale, scale), mode="bicubic", antialias=False)
    patches = patches.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], patches], dim=1)


def all_tokens(vit: VisionTransformer, images_BCHW: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Output of each given block (from 1), before the final norm, with prefix tokens: one [B, prefix + N, D] each.

    Raises:
        GladError: the images are not square or not divisible by the patch.
    """
    patch = vit.patch_embed.patch_size[0]
    height, width = images_BCHW.shape[-2:]
    if height != width or height % patch:
        raise GladError(f"features need square images divisible by the patch {patch}, got {height}x{width}")
    x = vit.patch_embed.norm(vit.patch_embed.proj(images_BCHW).flatten(2).transpose(1, 2))
    prefix = [
        token.expand(x.shape[0], -1, -1)
        for token in (vit.cls_token, getattr(vit, "reg_token", None))
        if token is not None
    ]
    positions = position_embedding(vit, height // patch)
    # DINOv2's register models add positions to patches only; DINO's add them to the class token too.
    x = torch.cat([*prefix, x + positions], 1) if vit.no_embed_class else torch.cat([*prefix, x], 1) + positions
    x = vit.norm_pre(x)
    tokens = []
    for number, block in enumerate(vit.blocks[: max(blocks)], start=1):
        x = block(x)
        if number in blocks:
            tokens.append(x)
    return tokens


def patch_tokens(vit: VisionTransformer, images_BCHW: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """`all_tokens` without the class and register tokens: one [B, N, D] for each block."""
    return [tokens[:, vit.num_prefix_tokens :] for tokens in all_tokens(vit, images_BCHW, blocks)]


def imagenet_normalize(images_BCHW: Tensor) -> Tensor:
    """Normalise [-1, 1] images as for ImageNet; values outside [-1, 1] are not clamped, as in the released code."""
    mean = images_BCHW.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = images_BCHW.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return ((images_BCHW + 1) / 2 - mean) / std
