"""The model bundle: a complete GLAD model in one folder of safetensors and JSON.

    unet/ vae/ scheduler/   diffusers format      features/ [final_features/]   timm name, arguments, weights
    prompt.safetensors      prompt embeddings    glad.json                    settings, provenance, sha256 of all files

Nothing here unpickles. ``final_features`` is present only if the final comparison, and the memory of good patches, use
other features than the steps: adapted to the category, or another network.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glad_core.bundle.configs import BackboneConfig, DiffusersConfig, SchedulerConfig, UNetConfig, VAEConfig
from glad_core.bundle.glad_json import GLAD_JSON, MEMORY, read_description, verify, write_description
from glad_core.bundle.good_scores import p_value
from glad_core.bundle.memory import PatchMemory, memory_tensors, read_memory
from glad_core.bundle.settings import Settings
from glad_core.bundle.weights import load_network, not_finite, read_shapes, read_tensors, storable
from glad_core.errors import GladError
from glad_core.features import Backbone, timm_network

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names users give


@dataclass(frozen=True)
class Model:
    """A loaded bundle. ``alphas`` is ᾱ_t [1000]; prompts are [1, L, D].

    With ``autocast`` (bfloat16 or float16) the networks' matrix products and convolutions run in that precision; the
    schedule, the comparisons and the scores stay in ``dtype``.

    A bundle for several categories has one prompt for each in ``prompts``; for a single category ``prompts`` is empty.
    ``memory`` are the good patches of every view, if the method is ``nearest``. ``good_scores`` are those of the good
    pictures behind the thresholds, by category as the bundle has thresholds.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    features: Backbone
    final_features: Backbone
    prompt_cond: Tensor
    prompt_uncond: Tensor
    alphas: Tensor
    settings: Settings
    category: str
    model_id: str
    device: torch.device
    dtype: torch.dtype
    prompts: dict[str, Tensor] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    memory: Sequence[PatchMemory] = ()
    good_scores: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def p_value(self, score: float, category: str | None) -> float | None:
        """The conformal `p_value` of a score; None if the bundle does not have the good scores of the threshold."""
        own = category if category in self.settings.thresholds else ""
        return p_value(score, self.good_scores.get(own or "", ()))

    def precision(self) -> torch.autocast:
        """The context that network calls run in."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def prompts_for(self, categories: Sequence[str | None]) -> Tensor:
        """The UNet's condition for images of these categories, [B, L, D].

        Raises:
            GladError: the bundle is for several categories, and one of these is not among them.
        """
        if not self.prompts:
            return self.prompt_cond.expand(len(categories), -1, -1)
        for category in categories:
            if category not in self.prompts:
                raise GladError(
                    f"category '{category}' is none of this bundle's ({', '.join(sorted(self.prompts))}); "
                    "score a folder whose subfolders are named like them, or give --category"
                )
        return torch.cat([self.prompts[str(category)] for category in categories])


def save_bundle(
    path: str | Path,
    *,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    features: Backbone,
    features_config: dict[str, Any],
    prompt_cond: Tensor,
    prompt_uncond: Tensor,
    settings: Settings,
    category: str,
    provenance: dict[str, Any],
    prompts: dict[str, Tensor] | None = None,
    final_features: Backbone | None = None,
    final_features_config: dict[str, Any] | None = None,
    scheduler_config: dict[str, Any] | None = None,
    memory: Sequence[PatchMemory] = (),
    overwrite: bool = False,
) -> str:
    """Write a bundle and return its model id. The folder appears complete or not at all.

    Args:
        path: local folder to create.
        features_config: what rebuilds ``features``: values of `BackboneConfig`.
        final_features_config: the same of ``final_features``; by default they are of one kind.
        prompts: one [1, L, D] embedding per category, in a bundle for several.
        scheduler_config: diffusers scheduler configuration; Stable Diffusion's β schedule by default.
        memory: good patches of every view, for method ``nearest``.
        overwrite: replace a bundle that is already there.

    Raises:
        GladError: something is already at ``path``, or weights are not finite.
    """
    path = Path(path)
    if path.exists() and not (overwrite and (path / GLAD_JSON).exists()):
        raise GladError(f"{path} already exists: choose another output folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _save_part(partial / "unet", unet)
        _save_part(partial / "vae", vae)
        scheduler = DDIMScheduler.from_config(scheduler_config or stable_diffusion_schedule())
        scheduler.save_pretrained(partial / "scheduler")
        _save_backbone(partial / "features", features, features_config)
        if final_features is not None:
            config = final_features_config or features_config
            _save_backbone(partial / "final_features", final_features, config)
        stored = {"cond": prompt_cond, "uncond": prompt_uncond}
        stored |= {f"cond/{name}": value for name, value in (prompts or {}).items()}
        _save_tensors(partial / "prompt.safetensors", stored, "prompt")
        if memory:
            _save_tensors(partial / MEMORY, memory_tensors(memory), "memory")
        description = write_description(partial, settings.model_dump(mode="json"), category, provenance)
        partial.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description.model_id


def save_derived(
    path: Path, base: Path, model: Model, settings: Settings, *, category: str, provenance: dict[str, Any]
) -> str:
    """Write a changed ``model``, loaded from the bundle ``base``, as a bundle of the same precision.

    Returns:
        The model id.
    """
    half = is_half(base)
    return save_bundle(
        path,
        unet=model.unet.half() if half else model.unet,
        vae=model.vae.half() if half else model.vae,
        features=model.features,
        features_config=json.loads((base / "features/config.json").read_text()),
        final_features=None if model.final_features is model.features else model.final_features,
        final_features_config=json.loads((base / final_folder(base) / "config.json").read_text()),
        prompt_cond=model.prompt_cond,
        prompt_uncond=model.prompt_uncond,
        prompts=model.prompts,
        settings=settings,
        category=category,
        provenance=provenance,
        scheduler_config=json.loads((base / "scheduler/scheduler_config.json").read_text()),
        memory=model.memory,
    )


def final_folder(path: Path) -> str:
    """The folder in a bundle of the features that the final comparison uses."""
    return "final_features" if (path / "final_features").is_dir() else "features"


def is_half(path: Path) -> bool:
    """Whether a bundle stores its UNet in float16."""
    with safe_open(path / "unet/diffusion_pytorch_model.safetensors", framework="pt") as weights:
        return weights.get_slice(next(iter(weights.keys()))).get_dtype() == "F16"


def load_bundle(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    settings: Settings | None = None,
    autocast: torch.dtype | None = None,
    model_id: str | None = None,
) -> Model:
    """Load a verified bundle for inference on ``device``. Nothing in it can run code or reach the network.

    Args:
        path: local folder.
        dtype: of weights and schedule.
        settings: replace the bundle's own.
        autocast: lower precision of the network calls.
        model_id: of the bundle that the job began with.

    Raises:
        GladError: no bundle, a damaged or incomplete one, tensors other than its networks have, settings that these
            cannot run, or another model than ``model_id``.
    """
    path = Path(path)
    description = verify(path)
    if model_id is not None and description.model_id != model_id:
        raise GladError(
            f"{path}: now holds model {description.model_id}, but this job began with {model_id}: "
            "put that one back and give the same command again, or begin anew with another output"
        )
    good_scores = {} if settings else description.provenance.get("good_scores", {})  # of the bundle's own settings
    settings = settings or Settings.parse(description.settings, str(path / GLAD_JSON))
    alphas = _read_alphas(path / "scheduler/scheduler_config.json")
    unet = _load_part(UNetConfig, path / "unet", device, dtype)
    vae = _load_part(VAEConfig, path / "vae", device, dtype)
    features = load_backbone(path / "features", device, dtype)
    own = final_folder(path) != "features"
    final = load_backbone(path / "final_features", device, dtype) if own else features
    prompts = _read_prompts(path / "prompt.safetensors", description.category, device, dtype)
    model = Model(
        unet=unet,
        vae=vae,
        features=features,
        final_features=final,
        prompt_cond=prompts["cond"],
        prompt_uncond=prompts["uncond"],
        prompts={name.removeprefix("cond/"): value for name, value in sorted(prompts.items()) if "/" in name},
        alphas=alphas.to(device),
        settings=settings,
        category=description.category,
        model_id=description.model_id,
        device=torch.device(device),
        dtype=dtype,
        autocast=autocast,
        memory=read_memory(path / MEMORY, len(settings.views), device) if settings.method == "nearest" else [],
        good_scores=good_scores,
    )
    _check_fit(model, str(path))
    if read_description(path) != description:
        raise GladError(f"{path}: was replaced while it was being loaded; give the same command again")
    return model


def stable_diffusion_schedule() -> dict[str, Any]:
    """Scheduler configuration of Stable Diffusion v1-4: β 0.00085..0.012 linear in the square root, ε prediction."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }


def _check_fit(model: Model, where: str) -> None:
    """Refuse settings that the networks cannot run.

    Raises:
        GladError: a side does not fit the networks, or the networks do not fit one another.
    """
    s = model.settings
    vae, unet = model.vae.config, model.unet.config
    if unet.in_channels != unet.out_channels:
        raise GladError(f"{where}: the UNet takes {unet.in_channels} channels and returns {unet.out_channels}")
    if s.start_step > len(model.alphas):
        raise GladError(f"{where}: start_step {s.start_step} is beyond the schedule's {len(model.alphas)} timesteps")
    if int(4 * s.blur_sigma + 0.5) >= s.feature_resolution:
        raise GladError(f"{where}: blur_sigma {s.blur_sigma:g} is too large for a map of {s.feature_resolution} pixels")
    if vae.latent_channels != unet.in_channels:
        raise GladError(
            f"{where}: the VAE makes {vae.latent_channels} latent channels, the UNet takes {unet.in_channels}"
        )
    multiple = model.vae_factor * 2 ** (len(unet.block_out_channels) - 1)
    if s.resolution % multiple:
        raise GladError(f"{where}: resolution {s.resolution} does not fit its networks: use a multiple of {multiple}")
    width = check_features(model.final_features, s.feature_resolution, where)
    for kept in model.memory:
        if kept.patches.shape[1] != width:
            raise GladError(
                f"{where}: its good patches are {kept.patches.shape[1]} wide, its features {width}: "
                "copy the bundle again or train it again"
            )
    if model.prompt_cond.shape[-1] != unet.cross_attention_dim:
        raise GladError(
            f"{where}: prompt embeddings are {model.prompt_cond.shape[-1]} wide, "
            f"the UNet expects {unet.cross_attention_dim}"
        )


def _save_backbone(folder: Path, backbone: Backbone, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    _save_tensors(folder / "model.safetensors", storable(backbone.net.state_dict()), folder.name)


def _save_part(folder: Path, network: Any) -> None:
    """The UNet or the VAE in diffusers' format."""
    network.to(memory_format=torch.contiguous_format)  # safetensors accepts no other, and the engine changes it
    _check_finite(folder.name, network.state_dict())
    network.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # where it was loaded from: the model id must not depend on that
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tensors(file: Path, tensors: dict[str, Tensor], part: str) -> None:
    _check_finite(part, tensors)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file)


def _check_finite(part: str, tensors: dict[str, Tensor]) -> None:
    if name := not_finite(tensors.items()):
        raise GladError(
            f"no bundle was written: tensor {name} of {part} holds values that are not finite; "
            "train with a lower --learning-rate or another --precision, or take other weights"
        )


def check_features(backbone: Backbone, side: int, where: str) -> int:
    """Check that images can be compared at a feature resolution of ``side`` pixels; returns the features' width.

    Raises:
        GladError: they cannot.
    """
    if backbone.fitting(side) != side:
        raise GladError(f"{where}: feature_resolution {side} does not fit its networks: use {backbone.sizes}")
    try:
        return backbone.try_size(side)
    except GladError as error:
        raise GladError(f"{where}: {error}") from error


def load_backbone(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """The network in a bundle's ``features`` folder: config.json (`BackboneConfig`) and safetensors.

    Raises:
        GladError: as `load_network`, or a configuration that no bundle has.
    """
    file = folder / "config.json"
    config = BackboneConfig.read(file)
    make = partial(timm_network, config.architecture, strides=config.strides, **config.arguments())
    net = load_network(make, file, folder / "model.safetensors", device, dtype)
    img_size = config.arguments().get("img_size")
    return Backbone(net, strides=config.strides, img_size=img_size, mean=config.mean, std=config.std)


def _load_part(config: type[DiffusersConfig], folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The UNet or the VAE."""
    file = folder / "config.json"
    make = partial(config.network, **config.read(file).arguments())
    return load_network(make, file, folder / "diffusion_pytorch_model.safetensors", device, dtype)


def _read_alphas(file: Path) -> Tensor:
    """ᾱ_t of a scheduler's configuration."""
    config = SchedulerConfig.read(file)
    if config.prediction_type != "epsilon":
        raise GladError(f"{file}: prediction type {config.prediction_type!r}; GLAD needs an epsilon model")
    alphas = DDIMScheduler(**config.arguments()).alphas_cumprod
    if not bool(((alphas > 0) & (alphas <= 1)).all()):
        raise GladError(f"{file}: its schedule leaves nothing of an image or is not finite; copy the bundle again")
    return alphas


def _read_prompts(file: Path, category: str, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The embeddings [1, L, D] ``cond`` and ``uncond``; ``cond/NAME`` for each of several categories.

    Raises:
        GladError: a name is missing or unknown, or shapes differ.
    """
    shapes = read_shapes(file)
    needed = {"cond", "uncond"} | ({f"cond/{name}" for name in category.split(",")} if "," in category else set())
    shape = shapes.get("cond", (1, 1, 1))
    if len(shape) != 3 or shape[0] != 1:
        raise GladError(f"{file}: tensor cond is {list(shape)}, not [1, L, D]; copy the bundle again or make it again")
    names = needed | {name for name in shapes if name.startswith("cond/")}
    return read_tensors(file, dict.fromkeys(names, shape), device, dtype)
