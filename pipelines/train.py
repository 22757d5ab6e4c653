"""`glad train`: fine-tune a bundle's UNet on one category's good images (ATP), calibrate it, leave a new bundle.

One process. The steps themselves are `glad_core.training.fine_tune`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open

from glad_core import bundle, synthesis, training
from glad_core.calibration import calibrate, judged_images
from glad_core.errors import GladError, did_you_mean
from glad_core.settings import Settings
from pipelines.decode import IMAGE_SUFFIXES, ImageError, decode

CHECKPOINT_EVERY = 100
HELD_OUT_SHARE, HELD_OUT_MIN, HELD_OUT_MAX = 0.1, 4, 40


@dataclass(frozen=True)
class TrainRequest:
    """What `glad train` was asked. ``None`` in the recipe's fields means: what the base bundle recommends."""

    dataset: Path
    category: str | None
    base: Path
    out: Path
    recipe: dict[str, Any]
    textures: Path | None = None
    device: str = "cpu"
    target_fpr: float = 0.05


def train(request: TrainRequest, console: Console) -> str:
    """Run the whole job and return the new bundle's model id.

    The work folder ``OUT.train`` beside the new bundle holds the loss log (``loss.jsonl``) and, until the bundle is
    written, the checkpoint from which the same command goes on after being killed.

    Raises:
        GladError: for anything wrong in the request, before the model is loaded.
    """
    category, files = good_images(request.dataset, request.category)
    manifest = bundle.read_manifest(request.base)
    if request.out.exists():
        raise GladError(f"{request.out} already exists: choose another --out or remove it")
    try:
        torch.empty(0, device=request.device)
    except (RuntimeError, AssertionError) as error:
        raise GladError(f"--device {request.device} cannot be used on this machine; try cpu") from error
    settings = Settings.parse(manifest.settings, str(request.base))
    recommended = manifest.provenance.get("recipe", {})
    recipe = training.Recipe(**recommended | {k: v for k, v in request.recipe.items() if v is not None})
    textures = None
    if request.textures is not None:
        textures = synthesis.load_textures(request.textures, settings.resolution, limit=500)
    images = load_images(files, settings.resolution)
    fit, held_out = split_held_out(files)
    fingerprint = hashlib.sha256(b"".join(images[i].tobytes() for i in range(len(images)))).hexdigest()[:16]

    work = request.out.parent / f"{request.out.name}.train"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GladError(f"cannot write {work}: {error.strerror}; choose another --out") from error
    model = bundle.load_bundle(request.base, request.device)
    state = training.TrainState.start(model.unet, recipe)
    identity = {"recipe": recipe.model_dump(), "base": manifest.model_id, "dataset": fingerprint, "category": category}
    _resume(state, work, identity, console)

    def batch(indices: list[int]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([images[fit[index]] for index in indices]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    steps = training.fine_tune(
        state, model.vae, model.alphas, model.prompt_cond, batch, len(fit), recipe, textures=textures
    )
    last_loss = _run_steps(steps, state, recipe, work, identity, console)
    state.finish()
    half = _is_half(request.base)
    if half:
        model.unet.half().float()  # calibrate what will be stored
    settings = _calibrated(model, [images[index] for index in held_out], recipe, request.target_fpr, console)

    provenance = {
        "base": manifest.model_id,
        "dataset_fingerprint": fingerprint,
        "good_images": len(fit),
        "held_out_images": len(held_out),
        "final_loss": last_loss,
        "recipe": recipe.model_dump(),
        "target_fpr": request.target_fpr,
    }
    model_id = bundle.save_bundle(
        request.out,
        unet=model.unet.half() if half else model.unet,
        vae=model.vae.half() if half else model.vae,
        features=model.features,
        features_config=json.loads((request.base / "features/config.json").read_text()),
        final_features=None if model.final_features is model.features else model.final_features,
        prompt_cond=model.prompt_cond,
        prompt_uncond=model.prompt_uncond,
        settings=settings,
        category=category,
        provenance=provenance,
        scheduler_config=json.loads((request.base / "scheduler/scheduler_config.json").read_text()),
    )
    (work / "checkpoint.pt").unlink(missing_ok=True)
    return model_id


def good_images(dataset: Path, category: str | None) -> tuple[str, list[Path]]:
    """The category's name and its ``train/good`` images in an MVTec-AD tree, or in one category's own folder.

    Raises:
        GladError: no such folder or category, or no images in it.
    """
    if not dataset.is_dir():
        raise GladError(f"{dataset}: no such dataset folder")
    if category is not None and (dataset / category / "train" / "good").is_dir():
        root = dataset / category
    elif (dataset / "train" / "good").is_dir() and category in (None, dataset.resolve().name):
        root = dataset
    else:
        known = sorted(path.parent.parent.name for path in dataset.glob("*/train/good"))
        if not known:
            raise GladError(f"{dataset}: no category with train/good in it; an MVTec-AD layout is expected")
        if category is None and len(known) == 1:
            return good_images(dataset, known[0])
        if category is None:
            raise GladError(f"{dataset} holds {len(known)} categories ({', '.join(known)}): pick one with --category")
        raise GladError(f"{dataset} has no category '{category}'{did_you_mean(category, known)}")
    files = sorted(path for path in (root / "train" / "good").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2 * HELD_OUT_MIN:
        raise GladError(f"{root / 'train' / 'good'}: {len(files)} images; at least {2 * HELD_OUT_MIN} are needed")
    return root.resolve().name, files


def load_images(files: Sequence[Path], resolution: int) -> np.ndarray:
    """All images as uint8 [N, R, R, 3]. A broken training image stops the job: the user should know."""
    images = np.empty((len(files), resolution, resolution, 3), np.uint8)
    for row, file in enumerate(files):
        try:
            images[row] = decode(file.read_bytes(), resolution).pixels
        except ImageError as error:
            raise GladError(f"{file}: {error}; remove or repair this training image") from error
    return images


def split_held_out(files: Sequence[Path]) -> tuple[list[int], list[int]]:
    """Indices to train on and to calibrate on; an image's side depends on its name alone, mostly."""
    order = sorted(range(len(files)), key=lambda index: hashlib.sha256(files[index].name.encode()).digest())
    count = min(HELD_OUT_MAX, max(HELD_OUT_MIN, round(len(files) * HELD_OUT_SHARE)))
    return sorted(order[count:]), sorted(order[:count])


def _run_steps(
    steps: Iterator[float],
    state: training.TrainState,
    recipe: training.Recipe,
    work: Path,
    identity: dict[str, Any],
    console: Console,
) -> float:
    """Drive the loop to its end: progress, loss log, checkpoints. Returns the mean loss of the last steps."""
    recent: list[float] = []
    with (
        _progress(console) as progress,
        (work / "loss.jsonl").open("a") as log,
    ):
        task = progress.add_task("train", total=recipe.steps, completed=state.step, note="")
        for loss in steps:
            recent = [*recent[-49:], loss]
            mean = sum(recent) / len(recent)
            log.write(
                json.dumps({"step": state.step, "loss": loss, "lr": state.optimizers[0].param_groups[0]["lr"]}) + "\n"
            )
            progress.update(task, completed=state.step, note=f"loss {mean:.4f}")
            if state.step % CHECKPOINT_EVERY == 0:
                log.flush()
                _save_checkpoint(state, work, identity)
            if not console.is_terminal and state.step % CHECKPOINT_EVERY == 0:
                console.print(f"train: step {state.step} of {recipe.steps}, loss {mean:.4f}")
        _save_checkpoint(state, work, identity)
    return sum(recent) / max(1, len(recent))


def _save_checkpoint(state: training.TrainState, work: Path, identity: dict[str, Any]) -> None:
    """Written aside and renamed, so that a kill at any moment leaves a whole checkpoint."""
    torch.save({"identity": identity, "state": state.state_dict()}, work / "checkpoint.new")
    os.replace(work / "checkpoint.new", work / "checkpoint.pt")


def _resume(state: training.TrainState, work: Path, identity: dict[str, Any], console: Console) -> None:
    """Go on from the checkpoint in ``work``, if there is one of this very run; cut the loss log back to it."""
    log = work / "loss.jsonl"
    if not (work / "checkpoint.pt").exists():
        log.unlink(missing_ok=True)
        return
    checkpoint = torch.load(work / "checkpoint.pt", weights_only=True)
    changed = [key for key, value in identity.items() if checkpoint["identity"].get(key) != value]
    if changed:
        raise GladError(
            f"{work} holds a checkpoint of another run (different {', '.join(changed)}): "
            "remove it or choose another --out"
        )
    state.load_state_dict(checkpoint["state"])
    lines = log.read_text().splitlines()[: state.step] if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines))
    console.print(f"train: going on from step {state.step}")


def _calibrated(
    model: bundle.Model, held_out: list[np.ndarray], recipe: training.Recipe, target_fpr: float, console: Console
) -> Settings:
    with _progress(console) as progress:
        task = progress.add_task("calibrate", total=judged_images(len(held_out)), note="")
        return calibrate(
            model,
            held_out,
            foreground_mode=recipe.foreground_mode,
            target_fpr=target_fpr,
            seed=recipe.seed,
            on_image=lambda done: progress.advance(task, done),
        )


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _is_half(base: Path) -> bool:
    """Whether the base bundle keeps its UNet in float16; the new bundle then does as well."""
    with safe_open(base / "unet/diffusion_pytorch_model.safetensors", framework="pt") as weights:
        return weights.get_slice(next(iter(weights.keys()))).get_dtype() == "F16"
