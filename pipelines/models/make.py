"""`glad bundle create | import-unet | inspect`: model bundles from published weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from glad_core.bundle import presets
from glad_core.bundle.configs import BackboneConfig
from glad_core.bundle.glad_json import Description, read_description
from glad_core.bundle.model import check_features, load_bundle, save_bundle, save_derived
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from glad_core.features import Backbone, timm_network

PROMPT = "a photo of sks"


def create(
    diffusion: str,
    features: str,
    out: Path,
    *,
    category: str,
    preset: str | None,
    settings: dict[str, Any],
    console: Console,
) -> str:
    """Write a bundle from a Stable Diffusion and a timm network; returns its model id.

    ``console`` gets what images are compared by, the weights' licence, and a feature resolution other than asked for.

    Args:
        diffusion: folder in diffusers format, or hub id such as ``CompVis/stable-diffusion-v1-4``.
        features: timm name such as ``vit_base_patch8_224.dino``; its pretrained weights are downloaded. Of a network
            of several stages, those compared may follow by their strides: ``resnet18.a1_in1k:8,16,32``.
        category: what the model judges; of several, separated by commas, each has its own prompt.
        preset: ``DATASET/CATEGORY`` of the published settings, e.g. ``MVTec-AD/screw``; a bundle for several categories
            takes those of the dataset's one model for all.
        settings: settings that override the preset's.

    Raises:
        GladError: a part cannot be loaded (or exists only as a pickle, which is never loaded), or ``out`` exists.
    """
    if out.exists():
        raise GladError(f"{out} already exists: choose another --out or remove it")
    if not Path(diffusion).exists() and diffusion.count("/") != 1:
        raise GladError(f"{diffusion}: no such folder; give a diffusers folder, or a hub id such as OWNER/MODEL")
    name, strides = _name_and_strides(features)
    published, recipe, category = _published(preset, category, multi_class="," in category)
    several = [each.strip() for each in category.split(",")] if "," in category else []
    parsed = Settings.parse(published | settings, "settings")
    unet = _part(UNet2DConditionModel, diffusion, "unet")
    vae = _part(AutoencoderKL, diffusion, "vae")
    cond, uncond, *each = _prompt_embeddings(diffusion, several)
    backbone, config = _pretrained(name, strides)
    parsed = _fit(parsed, backbone, config, console)
    return save_bundle(
        out,
        unet=unet,
        vae=vae,
        features=backbone,
        features_config=config,
        prompt_cond=cond,
        prompt_uncond=uncond,
        prompts=dict(zip(several, each, strict=True)),
        settings=parsed,
        category=",".join(several) or category,
        # The recipe holds the defaults of `glad train`.
        provenance={"diffusion": diffusion, "features": features, "prompt": PROMPT, "preset": preset, "recipe": recipe},
    )


def _published(
    preset: str | None, category: str, *, multi_class: bool = False
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Settings and training recipe of ``DATASET/CATEGORY``, and ``category``, by default the preset's."""
    if preset is None:
        return {}, {}, category
    dataset, _, name = preset.partition("/")
    settings = presets.preset(dataset, name, multi_class=multi_class)
    return settings, presets.training_preset(dataset, name, multi_class=multi_class), category or name


def import_unet(base: Path, checkpoint: Path, out: Path, *, category: str, preset: str | None) -> str:
    """Write ``base`` with the UNet of an authors' ``pytorch_model.bin``; returns the model id.

    Raises:
        GladError: not a checkpoint of tensors, or of another network than the base's UNet; ``out`` exists.
    """
    if out.exists():
        raise GladError(f"{out} already exists: choose another --out or remove it")
    if checkpoint.is_dir():
        checkpoint = checkpoint / "pytorch_model.bin"
    if not checkpoint.is_file():
        raise GladError(f"{checkpoint}: no such file; name the pytorch_model.bin of a checkpoint-* folder")
    description = read_description(base)
    published, recipe, category = _published(preset, category)
    parsed = Settings.parse(description.settings | published, "settings")
    weights = _read_checkpoint(checkpoint)
    model = load_bundle(base)
    _check_weights(checkpoint, weights, model.unet.state_dict())
    model.unet.load_state_dict(weights)
    return save_derived(
        out,
        base,
        model,
        parsed,
        category=category or description.category,
        provenance={
            "base": description.model_id,
            "unet_checkpoint": checkpoint.name,
            "preset": preset,
            "recipe": description.provenance.get("recipe", {}) if preset is None else recipe,
        },
    )


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name, read with ``weights_only=True`` so that no code in it runs."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes provoke
        raise GladError(
            f"{path}: not a safe checkpoint of tensors ({type(error).__name__}); nothing was run"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise GladError(f"{path}: not a flat table of tensors, so not a UNet checkpoint")
    return weights


def _check_weights(path: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() ^ weights.keys()):
        side = "lacks" if name in expected else "has an unknown"
        raise GladError(f"{path}: {side} weight {name}; it is not a checkpoint of this base's UNet")
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            raise GladError(
                f"{path}: {name} is {tuple(weights[name].shape)}, this base's UNet has {tuple(value.shape)}"
            )


def inspect(path: Path, console: Console) -> Description:
    """Check every file and tensor of a bundle and print its contents; returns its description.

    Raises:
        GladError: as `load_bundle`.
    """
    load_bundle(path)
    description = read_description(path)
    table = Table("part", "value", title=f"{escape(str(path))} · verified")
    table.add_row("model id", description.model_id)
    table.add_row("category", escape(description.category) or "(none)")
    for name, value in Settings.parse(description.settings, str(path)).model_dump().items():
        table.add_row(name, str(value))
    sizes: dict[str, int] = {}
    for name, entry in description.files.items():
        part = name.split("/")[0]
        sizes[part] = sizes.get(part, 0) + entry.size
    for part, size in sizes.items():
        table.add_row(part, f"{size / 1e6:.2f} MB")
    for folder in sorted({name.split("/")[0] for name in description.files if name.endswith("features/config.json")}):
        config = BackboneConfig.read(path / folder / "config.json")
        table.add_row(folder, escape(config.architecture))
        table.add_row(f"{folder}: licence of the weights", escape(config.licence))
    provenance: dict[str, Any] = {**description.provenance}
    if scores := provenance.pop("good_scores", {}):
        provenance["good_scores"] = f"{sum(map(len, scores.values()))}, for p-values"
    for name, value in {**provenance, **description.versions}.items():
        table.add_row(escape(name), escape(str(value)))
    console.print(table)
    return description


def _part(cls: Any, diffusion: str, subfolder: str) -> Any:
    """One network of a diffusers folder or hub repository, from safetensors only.

    Raises:
        GladError: none there, or it lacks tensors, which would be random numbers.
    """
    try:
        network, loading = cls.from_pretrained(
            diffusion, subfolder=subfolder, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        folder = Path(diffusion) / subfolder
        if folder.is_dir() and any(folder.glob("*.bin")):
            raise GladError(
                f"{folder} holds pickled weights only (.bin), which are never loaded: save it as safetensors first"
            ) from error
        if Path(diffusion).exists():
            raise GladError(f"{folder}: no {cls.__name__} in safetensors there; is it a diffusers folder?") from error
        raise GladError(
            f"'{diffusion}': no such folder, and the hub has no such model or cannot be reached; "
            "download it first and give the folder"
        ) from error
    for name in sorted(loading["missing_keys"]):
        raise GladError(f"{diffusion}: the weights in {subfolder} lack {name}; download or copy it again")
    return network


def _prompt_embeddings(diffusion: str, categories: list[str]) -> tuple[Tensor, ...]:
    """Embeddings of the constant prompt, of the empty one and of the prompt with each category, [1, L, D] each."""
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = _part(CLIPTextModel, diffusion, "text_encoder")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(diffusion, subfolder="tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise GladError(f"{Path(diffusion) / 'tokenizer'}: no CLIP tokenizer there") from error
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer([PROMPT, "", *(f"{PROMPT} {name}" for name in categories)], max_length=length, **options)
    with torch.inference_mode():
        return encoder(tokens.input_ids)[0].clone().split(1)


def _name_and_strides(features: str) -> tuple[str, list[int] | None]:
    """The two parts of ``NAME:8,16``, checked without weights; None if there are no strides.

    Raises:
        GladError: timm has no such network, or the network no such stages.
    """
    name, colon, stages = features.partition(":")
    if colon and not re.fullmatch(r"\d{1,3}(,\d{1,3}){0,3}", stages):
        raise GladError(f"'{features}': give a timm name, or one with strides of its stages, such as resnet18:8,16")
    strides = [int(stride) for stride in stages.split(",")] if colon else None
    with torch.device("meta"):
        timm_network(name, strides=strides)
    return name, strides


def _pretrained(name: str, strides: list[int] | None) -> tuple[Backbone, dict[str, Any]]:
    """A network with its pretrained weights, and its config.json for a bundle.

    Raises:
        GladError: there are no weights, or the hub cannot be reached.
    """
    try:
        net: Any = timm_network(name, strides=strides, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, GladError):
            raise
        raise GladError(
            f"'{name}': its pretrained weights cannot be fetched (no network to the hub?); "
            "run once on a machine that reaches the hub"
        ) from error
    known = net.pretrained_cfg
    backbone = Backbone(net, strides=strides, mean=known["mean"], std=known["std"])
    config: dict[str, Any] = {"architecture": name, "args": {}, "mean": list(backbone.mean), "std": list(backbone.std)}
    config |= {"licence": known["license"]} if known.get("license") else {}
    return backbone, config | ({"strides": backbone.strides} if backbone.pyramid else {})


def _fit(settings: Settings, backbone: Backbone, config: dict[str, Any], console: Console) -> Settings:
    """Settings with a feature resolution that the network takes; says what is compared, and what was changed.

    Raises:
        GladError: it takes none.
    """
    side = backbone.fitting(settings.feature_resolution)
    check_features(backbone, side, config["architecture"])
    licence = BackboneConfig.parse(config, "features").licence
    layers = (
        f"strides {', '.join(map(str, backbone.strides))}" if backbone.pyramid else f"{len(backbone.layers)} blocks"
    )
    lines = [f"features: {config['architecture']}, {layers}; licence of its weights: {licence}"]
    if side != settings.feature_resolution:
        wanted = settings.feature_resolution
        lines.append(f"features: compared at {side} pixels instead of {wanted}: this network takes {backbone.sizes}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return settings.model_copy(update={"feature_resolution": side})
