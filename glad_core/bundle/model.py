"""The model bundle: a complete GLAD model in one folder of safetensors and JSON.

    unet/ vae/ scheduler/   diffusers format      features/ [final_features/]   timm name, arguments, weights
    prompt.safetensors      prompt embeddings    glad.json                    settings, provenance, sha256 of all files

Nothing here unpickles. ``final_features`` is present only if the final comparison uses a ViT adapted to the category
while the steps use the frozen one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from glad_core.bundle.glad_json import GLAD_JSON, verify, write_description
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from glad_core.features import create_vit

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names users give


@dataclass(frozen=True)
class Model:
    """A loaded bundle. ``alphas`` is ᾱ_t [1000]; prompts are [1, L, D].

    With ``autocast`` (bfloat16 or float16) the networks' matrix products and convolutions run in that precision; the
    schedule, the comparisons and the scores stay in ``dtype``.

    A bundle for several categories has one prompt for each in ``prompts``; for a single category ``prompts`` is empty.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    features: VisionTransformer
    final_features: VisionTransformer
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
    features: VisionTransformer,
    features_config: dict[str, Any],
    prompt_cond: Tensor,
    prompt_uncond: Tensor,
    settings: Settings,
    category: str,
    provenance: dict[str, Any],
    prompts: dict[str, Tensor] | None = None,
    final_features: VisionTransformer | None = None,
    scheduler_config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Write a bundle and return its model id. The folder appears complete or not at all.

    Args:
        path: local folder to create.
        features_config: ``{"architecture": timm name, "args": keyword arguments}`` that rebuild ``features``.
        prompts: one [1, L, D] embedding per category, in a bundle for several.
        scheduler_config: diffusers scheduler configuration; Stable Diffusion's β schedule by default.
        overwrite: replace a bundle that is already there.

    Raises:
        GladError: something is already at ``path``.
    """
    path = Path(path)
    if path.exists() and not (overwrite and (path / GLAD_JSON).exists()):
        raise GladError(f"{path} already exists: choose another output folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        for network in (unet, vae):
            network.to(memory_format=torch.contiguous_format)  # safetensors accepts no other, and the engine changes it
        unet.save_pretrained(partial / "unet", safe_serialization=True)
        vae.save_pretrained(partial / "vae", safe_serialization=True)
        scheduler = DDIMScheduler.from_config(scheduler_config or stable_diffusion_schedule())
        scheduler.save_pretrained(partial / "scheduler")
        _save_vit(partial / "features", features, features_config)
        if final_features is not None:
            _save_vit(partial / "final_features", final_features, features_config)
        stored = {"cond": prompt_cond, "uncond": prompt_uncond}
        stored |= {f"cond/{name}": value for name, value in (prompts or {}).items()}
        stored = {name: value.detach().clone().contiguous() for name, value in stored.items()}
        save_file(stored, partial / "prompt.safetensors")
        description = write_description(partial, settings.model_dump(), category, provenance)
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
        prompt_cond=model.prompt_cond,
        prompt_uncond=model.prompt_uncond,
        prompts=model.prompts,
        settings=settings,
        category=category,
        provenance=provenance,
        scheduler_config=json.loads((base / "scheduler/scheduler_config.json").read_text()),
    )


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
) -> Model:
    """Load a verified bundle for inference on ``device``.

    Args:
        path: local folder.
        dtype: of weights and schedule.
        settings: replace the bundle's own.
        autocast: lower precision of the network calls.

    Raises:
        GladError: no bundle, a damaged or incomplete one, or settings that its networks cannot run.
    """
    path = Path(path)
    description = verify(path)
    settings = settings or Settings.parse(description.settings, str(path / GLAD_JSON))
    scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
    if scheduler.config.prediction_type != "epsilon":
        raise GladError(f"{path}: prediction type '{scheduler.config.prediction_type}'; GLAD needs an epsilon model")
    load = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
    unet = UNet2DConditionModel.from_pretrained(path / "unet", **load)
    vae = AutoencoderKL.from_pretrained(path / "vae", **load)
    features = load_vit(path / "features", device, dtype)
    final = load_vit(path / "final_features", device, dtype) if (path / "final_features").is_dir() else features
    prompts = load_file(path / "prompt.safetensors")
    model = Model(
        unet=unet.to(device).eval().requires_grad_(False),
        vae=vae.to(device).eval().requires_grad_(False),
        features=features,
        final_features=final,
        prompt_cond=prompts["cond"].to(device, dtype),
        prompt_uncond=prompts["uncond"].to(device, dtype),
        prompts={
            name.removeprefix("cond/"): value.to(device, dtype)
            for name, value in sorted(prompts.items())
            if name.startswith("cond/")
        },
        alphas=scheduler.alphas_cumprod.to(device),
        settings=settings,
        category=description.category,
        model_id=description.model_id,
        device=torch.device(device),
        dtype=dtype,
        autocast=autocast,
    )
    _check_fit(model, str(path))
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
    if vae.latent_channels != unet.in_channels:
        raise GladError(
            f"{where}: the VAE makes {vae.latent_channels} latent channels, the UNet takes {unet.in_channels}"
        )
    multiple = model.vae_factor * 2 ** (len(unet.block_out_channels) - 1)
    patch = model.features.patch_embed.patch_size[0]
    for name, side, unit in (
        ("resolution", s.resolution, multiple),
        ("resolution", s.resolution, patch),
        ("feature_resolution", s.feature_resolution, model.final_features.patch_embed.patch_size[0]),
    ):
        if side % unit:
            raise GladError(f"{where}: {name} {side} does not fit its networks: use a multiple of {unit}")
    if model.prompt_cond.shape[-1] != unet.cross_attention_dim:
        raise GladError(
            f"{where}: prompt embeddings are {model.prompt_cond.shape[-1]} wide, "
            f"the UNet expects {unet.cross_attention_dim}"
        )


def _save_vit(folder: Path, vit: VisionTransformer, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, folder / "model.safetensors")


def load_vit(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A ViT from a bundle's ``features`` folder: config.json (timm name and arguments) and safetensors."""
    config = json.loads((folder / "config.json").read_text())
    vit = create_vit(config["architecture"], **config["args"])
    vit.load_state_dict(load_file(folder / "model.safetensors"))
    return vit.to(device, dtype)
