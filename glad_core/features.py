"""What images are compared by: feature maps of a frozen timm network, as tokens on a square grid.

A vision transformer gives the tokens of four blocks, as the paper compares them (Sec. 3.6). A network whose maps shrink
from stage to stage gives one layer: two or three stages brought to the grid of the finest, unit length each, and
concatenated.

Shapes: B batch, N tokens (without class and register tokens), D embedding width, g tokens along one side.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from glad_core.errors import GladError, one_line

NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)?")  # timm's architecture, and a tag of its weights
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FINEST = 8  # pixels along a token: stages finer than that say little and cost much
STAGES = 2  # compared by default, as in PatchCore


class Backbone(nn.Module):
    """A frozen timm network and which of its maps are compared.

    Args:
        net: from `timm_network`.
        strides: pixels per place of the stages compared, for a network of several; None: `FINEST` and the next.
        img_size: the only side that ``net`` takes, if it was built for another than its usual one.
        mean, std: of the colours in [0, 1] that ``net`` was trained on.

    Raises:
        GladError: ``net`` has no such stages.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        strides: Sequence[int] | None = None,
        img_size: int | Sequence[int] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, tuple(mean), tuple(std)
        self.layers = compared_layers(net, strides)
        self.pyramid = len(set(_reductions(net))) > 1
        self.strides = [_reductions(net)[layer] for layer in self.layers]
        self.multiple = max(self.strides)
        config: Any = net.pretrained_cfg
        size = img_size or config["input_size"][-1]
        self.fixed = None if _any_size(net) else size if isinstance(size, int) else size[0]

    def adaptable(self) -> list[nn.Parameter]:
        """The weights that `--part dino` trains: the MLPs of the blocks compared, or the stages compared.

        Raises:
            GladError: timm names no such layers, or they have no weights.
        """
        info: Any = self.net.feature_info
        try:
            parts = [self.net.get_submodule(info[layer]["module"]) for layer in self.layers]
        except (AttributeError, KeyError):
            parts = []
        weights = [weight for part in parts for weight in getattr(part, "mlp", part).parameters()]
        if not weights:
            raise GladError(f"features of a {type(self.net).__name__} cannot be adapted: train --part unet or vae")
        return weights

    @property
    def sizes(self) -> str:
        """The sides of images that it takes, in words."""
        return f"a multiple of {self.multiple}" if self.fixed is None else f"{self.fixed}"

    def fitting(self, side: int) -> int:
        """The side nearest to ``side`` that it takes."""
        return self.fixed or max(1, round(side / self.multiple)) * self.multiple

    def forward(self, images_B3RR: Tensor, *, last: bool = False) -> list[Tensor]:
        """The layers compared, [B, N, D] each; images of another side than it takes are resized to the nearest.

        Args:
            last: the last of the layers only.
        """
        side = self.fitting(images_B3RR.shape[-1])
        if images_B3RR.shape[-2:] != (side, side):
            images_B3RR = F.interpolate(images_B3RR, size=(side, side), mode="bilinear", align_corners=True)
        if _is_dino(self.net):
            blocks = [layer + 1 for layer in self.layers[-1 if last else 0 :]]
            return [tokens[:, self.net.num_prefix_tokens :] for tokens in all_tokens(self.net, images_B3RR, blocks)]
        layers = self.layers[-1:] if last and not self.pyramid else self.layers
        read: Any = self.net.forward_intermediates
        maps = read(images_B3RR, indices=layers, stop_early=True, output_fmt="NCHW", intermediates_only=True)
        return [_one_grid(maps)] if self.pyramid else [each.flatten(2).transpose(1, 2) for each in maps]

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Normalise [-1, 1] images as it was trained. Values outside are not clamped, as in the released code."""
        mean, std = (images_BCHW.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((images_BCHW + 1) / 2 - mean) / std

    @torch.inference_mode()
    def try_size(self, side: int) -> int:
        """The width of all layers compared together; found with one image of ``side`` pixels, unless it is known.

        Raises:
            GladError: there are none, or not on a square grid.
        """
        if _is_dino(self.net):
            return len(self.layers) * self.net.embed_dim
        what = f"a {type(self.net).__name__} cannot compare images of {side} pixels"
        parameter = next(self.net.parameters())
        try:
            layers = self(torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype))
        except Exception as error:  # timm's networks raise whatever a size provokes
            why = one_line(error) or type(error).__name__
            raise GladError(f"{what} ({why}): choose another feature_resolution or other features") from error
        if any(round(tokens.shape[1] ** 0.5) ** 2 != tokens.shape[1] for tokens in layers):
            raise GladError(f"{what} (its map is not square): choose other features")
        return sum(tokens.shape[2] for tokens in layers)


def create_backbone(
    architecture: str, *, strides: Sequence[int] | None = None, pretrained: bool = False, **args: Any
) -> Backbone:
    """`timm_network` as a backbone that normalises images as in the paper, whatever its weights were trained on.

    Raises:
        GladError: as `timm_network` and `Backbone`.
    """
    net = timm_network(architecture, strides=strides, pretrained=pretrained, **args)
    return Backbone(net, strides=strides, img_size=args.get("img_size"))


def timm_network(
    architecture: str, *, strides: Sequence[int] | None = None, pretrained: bool = False, **args: Any
) -> nn.Module:
    """A frozen timm network without its classifier, e.g. ``vit_base_patch8_224.dino`` (the paper's, Sec. 4.2).

    Of a network of several stages those after the last one compared are cut off.

    Raises:
        GladError: timm itself does not know the name, or has no feature maps of it.
    """
    # Of names with a colon or a slash timm asks the hub or reads folders.
    if not NAME.fullmatch(architecture) or not timm.is_model(architecture):
        raise GladError(f"timm has no model {architecture!r}: choose one of timm.list_models()")
    args = {"num_classes": 0, **args}
    try:
        with torch.device("meta"):  # only to look at what it is
            net = timm.create_model(architecture, **args)
        if not _is_dino(net) and _takes_any_size(net):
            args = {**args, "dynamic_img_size": True}
        net = timm.create_model(architecture, pretrained=pretrained, **args)
    except RuntimeError as error:
        if "Invalid pretrained tag" not in str(error):
            raise
        raise GladError(f"timm has no weights {architecture!r}: choose one of timm.list_pretrained()") from error
    layers = compared_layers(net, strides)
    if len(set(_reductions(net))) > 1:
        prune: Any = net.prune_intermediate_layers
        prune(layers, prune_norm=True, prune_head=True)
    return net.eval().requires_grad_(False)


def compared_layers(net: nn.Module, strides: Sequence[int] | None = None) -> list[int]:
    """The layers of ``net.feature_info`` that are compared.

    Of a vision transformer blocks 3, 6, 9 and 12 of 12 (Sec. 3.6), evenly spread for other depths. Of a network of
    several stages the last one of each of the ``strides``.

    Raises:
        GladError: it has no maps, or none of such a stride.
    """
    reductions = _reductions(net)
    if len(set(reductions)) == 1:
        if strides is not None:
            raise GladError(f"a {type(net).__name__} has blocks of one stride, {reductions[0]}: give its name alone")
        depth = len(reductions)
        return sorted({max(1, round(depth * quarter / 4)) - 1 for quarter in (1, 2, 3, 4)})
    there = sorted(set(reductions))
    wanted = list(strides or [stride for stride in there if stride >= FINEST][:STAGES])
    for stride in wanted:
        if stride not in there:
            known = ", ".join(map(str, there))
            raise GladError(f"a {type(net).__name__} has no stage of stride {stride}: choose two or three of {known}")
    return sorted({max(index for index, other in enumerate(reductions) if other == stride) for stride in wanted})


def position_embedding(vit: VisionTransformer, grid: int) -> Tensor:
    """The position table for a ``grid`` x ``grid`` image, [1, prefix + grid², D].

    As in DINO's own code: bicubic without antialiasing, sampled with the scale factor (g + 0.1) / g0. The scale
    determines the sampling positions, so resizing to a given size, as timm does, gives other numbers.
    """
    table = vit.pos_embed
    assert table is not None  # _is_dino
    prefix = vit.num_prefix_tokens
    native = round((table.shape[1] - prefix) ** 0.5)
    if grid == native:
        return table
    patches = table[:, prefix:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / native
    patches = F.interpolate(patches.float(), scale_factor=(scale, scale), mode="bicubic", antialias=False)
    patches = patches.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], patches], dim=1)


def all_tokens(vit: VisionTransformer, images_BCHW: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """DINO's own forward: each given block's (from 1) output before the final norm, [B, 1 + N, D] each."""
    x = vit.patch_embed.norm(vit.patch_embed.proj(images_BCHW).flatten(2).transpose(1, 2))
    assert vit.cls_token is not None  # _is_dino
    x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x], 1)
    x = vit.norm_pre(x + position_embedding(vit, round((x.shape[1] - 1) ** 0.5)))
    tokens = []
    for number, block in enumerate(vit.blocks[: max(blocks)], start=1):
        x = block(x)
        if number in blocks:
            tokens.append(x)
    return tokens


def _is_dino(net: nn.Module) -> TypeGuard[VisionTransformer]:
    """Whether it is built like DINO's and DINOv2's first ones; the authors of all others resize positions as timm."""
    return (
        type(net) is VisionTransformer
        and type(net.patch_embed) is PatchEmbed
        and net.pos_embed is not None
        and net.has_class_token
        and net.num_prefix_tokens == 1
        and not net.no_embed_class
    )


def _takes_any_size(net: nn.Module) -> bool:
    starts: list[Any] = [vars(kind)["__init__"] for kind in type(net).__mro__ if "__init__" in vars(kind)]
    return any("dynamic_img_size" in inspect.signature(start).parameters for start in starts)


def _any_size(net: nn.Module) -> bool:
    config: Any = net.pretrained_cfg
    return _takes_any_size(net) or not config.get("fixed_input_size")


def _reductions(net: nn.Module) -> list[int]:
    """Pixels per place of every map, from the first."""
    info: Any = getattr(net, "feature_info", None)
    if not info or not hasattr(net, "forward_intermediates"):
        raise GladError(f"timm gives no feature maps of a {type(net).__name__}: choose another network")
    return [int(each["reduction"]) for each in info]


def _one_grid(maps: Sequence[Tensor]) -> Tensor:
    """Maps of several stages as one layer of tokens of unit length, [B, N, D]."""
    side = max(each.shape[-1] for each in maps)
    units = []
    for each in maps:
        each = each.float()
        if each.shape[-1] != side:
            each = F.interpolate(each, size=(side, side), mode="bilinear", align_corners=False)
        units.append(F.normalize(each, dim=1))
    return torch.cat(units, dim=1).flatten(2).transpose(1, 2) / len(units) ** 0.5
