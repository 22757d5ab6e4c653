"""The configurations of a bundle's networks: a fixed set of architectural values, checked before anything is built.

A bundle may come from anybody. Whatever else diffusers and timm read from a configuration (checkpoints that they would
unpickle, names on the hub, code) is refused here, and so are sizes that no such network has.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import ConfigDict, Field

from glad_core.bundle.glad_json import read_json
from glad_core.bundle.settings import FrozenSettings
from glad_core.errors import GladError
from glad_core.features import IMAGENET_MEAN, IMAGENET_STD

Width = Annotated[int, Field(ge=1, le=65_536)]  # channels, heads, pixels
Depth = Annotated[int, Field(ge=1, le=32)]  # layers of a block
Widths = Annotated[list[Width], Field(min_length=1, max_length=8)]  # one for each block
Colour = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=1e-3, le=1)]
Stride = Annotated[int, Field(ge=1, le=256)]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
PROVENANCE = ("_class_name", "_diffusers_version", "_name_or_path")  # written by diffusers, not architectural


class DiffusersConfig(FrozenSettings):
    """A configuration in diffusers' format. Keys of ``network`` that are not a field must have diffusers' default."""

    model_config = ConfigDict(strict=True)
    network: ClassVar[Any]

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a config.json.

        Raises:
            GladError: damaged, of another class, or with a key or value that GLAD's networks do not have.
        """
        values = read_json(file)
        name = values.get("_class_name", cls.network.__name__)
        if name != cls.network.__name__:
            raise GladError(f"{file}: describes a {name!r}, not a {cls.network.__name__}; copy the bundle again")
        known = inspect.signature(cls.network.__init__).parameters
        chosen = {}
        for key, value in values.items():
            if key in cls.model_fields or key not in known:
                chosen[key] = value
            elif value != (default := _as_json(known[key].default)):
                raise GladError(f"{file}: '{key}' must be {default!r} in a GLAD bundle; make the bundle again")
        return _parse(cls, {key: value for key, value in chosen.items() if key not in PROVENANCE}, file)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``network``."""
        return self.model_dump(exclude_unset=True)


class UNetConfig(DiffusersConfig):
    """A UNet like Stable Diffusion's, of any width and depth."""

    network = UNet2DConditionModel

    sample_size: Width | list[Width] | None = None
    in_channels: Width = 4
    out_channels: Width = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    down_block_types: list[Literal["CrossAttnDownBlock2D", "DownBlock2D"]]
    up_block_types: list[Literal["CrossAttnUpBlock2D", "UpBlock2D"]]
    only_cross_attention: bool = False
    block_out_channels: Widths
    layers_per_block: Depth | list[Depth] = 2
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    act_fn: Activation = "silu"
    norm_num_groups: Width = 32
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    cross_attention_dim: Width = 1280
    transformer_layers_per_block: Depth | list[Depth] = 1
    attention_head_dim: Width | list[Width] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"


class VAEConfig(DiffusersConfig):
    """A VAE like Stable Diffusion's, from pixels to any number of latent channels."""

    network = AutoencoderKL

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: list[Literal["DownEncoderBlock2D"]]
    up_block_types: list[Literal["UpDecoderBlock2D"]]
    block_out_channels: Widths
    layers_per_block: Depth = 1
    act_fn: Activation = "silu"
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    sample_size: Width | list[Width] = 32
    scaling_factor: Annotated[float, Field(gt=0, le=1e3)] = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class SchedulerConfig(DiffusersConfig):
    """The noise schedule. Only its β count; how diffusers would sample with it does not."""

    network = DDIMScheduler

    num_train_timesteps: Annotated[int, Field(ge=1, le=10_000)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(max_length=10_000)] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"


class BackboneArguments(FrozenSettings):
    """The arguments of timm's vision transformers that a bundle may give; the others are the architecture's own."""

    model_config = ConfigDict(strict=True)

    img_size: Width | list[Width] = 224
    patch_size: Annotated[int, Field(ge=1, le=256)] = 16
    in_chans: Literal[3] = 3
    num_classes: Literal[0] = 0
    embed_dim: Width = 768
    depth: Annotated[int, Field(ge=1, le=256)] = 12
    num_heads: Width = 12
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: Annotated[float, Field(ge=0, le=1e3)] | None = None
    class_token: bool = True
    no_embed_class: bool = False
    reg_tokens: Annotated[int, Field(ge=0, le=256)] = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    global_pool: Literal["", "avg", "token"] = "token"
    dynamic_img_size: bool = False


class BackboneConfig(FrozenSettings):
    """A ``features/config.json``: timm's name of an architecture, arguments that differ from it, and what is compared.

    ``strides`` names the stages compared, of a network of several; ``mean`` and ``std`` are of the colours in [0, 1]
    that the weights were trained on; ``licence`` is the weights' own.
    """

    model_config = ConfigDict(strict=True)

    architecture: str
    args: BackboneArguments
    strides: Annotated[list[Stride], Field(min_length=1, max_length=4)] | None = None
    mean: list[Colour] = Field(list(IMAGENET_MEAN), min_length=3, max_length=3)
    std: list[Spread] = Field(list(IMAGENET_STD), min_length=3, max_length=3)
    licence: Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] = "not recorded"

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a config.json. Raises GladError: damaged, or with other keys or values."""
        return _parse(cls, read_json(file), file)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `glad_core.features.timm_network`."""
        return self.args.model_dump(exclude_unset=True)


C = TypeVar("C", bound=FrozenSettings)


def _parse(kind: type[C], values: dict[str, Any], file: Path) -> C:
    try:
        return kind.parse(values, str(file))
    except GladError as error:
        raise GladError(f"{error}; copy the bundle again, or make it again") from error


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
