"""The model bundle: everything one GLAD model is, in one folder of safetensors and JSON.

    unet/ vae/ scheduler/   diffusers format      features/ [final_features/]   timm name, arguments, weights
    prompt.safetensors      prompt embeddings    glad.json                    settings, provenance, sha256 of all files

Nothing here ever unpickles. ``final_features`` is present only where the final comparison uses a ViT adapted to the
category while the steps use the frozen one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from glad_core.errors import GladError
from glad_core.features import create_vit
from glad_core.settings import Settings

SCHEMA_VERSION = 1
MANIFEST = "glad.json"
REQUIRED = (
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "features/config.json",
    "features/model.safetensors",
    "prompt.safetensors",
)


class FileEntry(BaseModel):
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


class Manifest(BaseModel):
    """``glad.json``: what a bundle is, readable without loading a tensor.

    ``model_id`` is a hash of the settings, the category and all file hashes: two bundles that judge alike share it.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    model_id: str
    category: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Model:
    """A loaded bundle. ``alphas`` is ᾱ_t [1000]; prompts are [1, L, D]; ``vae_factor`` pixels per latent.

    With ``autocast`` (bfloat16 or float16) the networks' matrix products and convolutions run in that precision; the
    schedule, the comparisons and the scores stay in ``dtype``.

    A bundle for several categories has a prompt for each in ``prompts``; one for a single category has none there.
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
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def prompts_for(self, categories: Sequence[str | None]) -> Tensor:
        """The UNet's condition for images of these categories, [B, L, D].

        Raises:
            GladError: the bundle is for several categories, and this is none of them.
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
    """Write a bundle and return its model id. The folder appears whole or not at all.

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
    if path.exists() and not (overwrite and (path / MANIFEST).exists()):
        raise GladError(f"{path} already exists: choose another output folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        for network in (unet, vae):
            network.to(memory_format=torch.contiguous_format)  # safetensors takes no other; the engine changes it
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
        manifest = _write_manifest(partial, settings.model_dump(), category, provenance)
        partial.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest.model_id


def save_derived(
    path: Path, base: Path, model: Model, settings: Settings, *, category: str, provenance: dict[str, Any]
) -> str:
    """Write ``model``, which was loaded from the bundle ``base`` and changed, as a bundle of base's precision.

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
    """Whether a bundle keeps its UNet in float16."""
    with safe_open(path / "unet/diffusion_pytorch_model.safetensors", framework="pt") as weights:
        return weights.get_slice(next(iter(weights.keys()))).get_dtype() == "F16"


def update_settings(path: str | Path, settings: Settings, provenance: dict[str, Any]) -> str:
    """Give an existing bundle new settings (after calibration); weights stay. Returns the new model id."""
    manifest = read_manifest(path)
    provenance = manifest.provenance | provenance
    return _write_manifest(Path(path), settings.model_dump(), manifest.category, provenance).model_id


def read_manifest(path: str | Path) -> Manifest:
    """Read and check ``glad.json`` and the presence and size of every file, without loading tensors.

    Raises:
        GladError: not a bundle, of another schema version, or incomplete; one line each.
    """
    path = Path(path)
    if not path.is_dir():
        raise GladError(f"{path}: no such model bundle folder; make one with `glad bundle create` or `glad train`")
    if not (path / MANIFEST).is_file():
        hint = " (a diffusers folder: turn it into a bundle with `glad bundle create`)" if _is_diffusers(path) else ""
        raise GladError(f"{path}: not a GLAD bundle, it has no {MANIFEST}{hint}")
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        raise GladError(
            f"{path / MANIFEST}: damaged or of another program; restore the bundle from its source"
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise GladError(
            f"{path}: bundle schema version {manifest.schema_version}, this program reads {SCHEMA_VERSION}: "
            "use the matching glad version or make the bundle again"
        )
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    required = {name for name in REQUIRED if name not in manifest.files}
    for name in sorted((set(manifest.files) | required) - present):
        raise GladError(f"{path}: incomplete bundle, {name} is missing; copy the bundle again")
    for name in sorted(required):
        raise GladError(f"{path}: incomplete bundle, {MANIFEST} does not list {name}; make the bundle again")
    for name in sorted(present - set(manifest.files)):
        raise GladError(f"{path}: {name} is not listed in {MANIFEST}; remove it or make the bundle again")
    for name, entry in sorted(manifest.files.items()):
        size = (path / name).stat().st_size
        if size != entry.size:
            raise GladError(f"{path}: damaged bundle, {name} has {size} bytes instead of {entry.size}; copy it again")
    Settings.parse(manifest.settings, str(path / MANIFEST))
    return manifest


def verify(path: str | Path) -> Manifest:
    """`read_manifest`, and the sha256 of every file and the model id as well."""
    path = Path(path)
    manifest = read_manifest(path)
    for name, entry in sorted(manifest.files.items()):
        if _sha256(path / name) != entry.sha256:
            raise GladError(f"{path}: damaged bundle, {name} does not match its sha256; copy the bundle again")
    if _model_id(manifest.settings, manifest.category, manifest.files) != manifest.model_id:
        raise GladError(f"{path}: {MANIFEST} was changed by hand, its model id no longer fits; use `glad` to change it")
    return manifest


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
        settings: score with these instead of the bundle's own.
        autocast: lower precision of the network calls.

    Raises:
        GladError: missing, damaged, incomplete or foreign bundle, or settings its networks cannot run.
    """
    path = Path(path)
    manifest = verify(path)
    settings = settings or Settings.parse(manifest.settings, str(path / MANIFEST))
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
        category=manifest.category,
        model_id=manifest.model_id,
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
    """Settings the networks cannot run are refused before the first image."""
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


def _write_manifest(path: Path, settings: dict[str, Any], category: str, provenance: dict[str, Any]) -> Manifest:
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    files = {name: FileEntry(size=(path / name).stat().st_size, sha256=_sha256(path / name)) for name in names}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model_id=_model_id(settings, category, files),
        category=category,
        settings=settings,
        provenance=provenance,
        versions={name: version(name) for name in ("glad-ray", "torch", "diffusers", "timm")},
        files=files,
    )
    written = path / f".{MANIFEST}.new"
    written.write_text(manifest.model_dump_json(indent=1) + "\n")
    written.rename(path / MANIFEST)  # atomic: a reader sees the old or the new one
    return manifest


def _model_id(settings: dict[str, Any], category: str, files: dict[str, FileEntry]) -> str:
    content = {
        "settings": settings,
        "category": category,
        "files": {name: entry.sha256 for name, entry in sorted(files.items())},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def _is_diffusers(path: Path) -> bool:
    return (path / "model_index.json").is_file()
