"""The end of a training run: trained weights into the base, calibration on the held-out images, delivery."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from glad_core.bundle.glad_json import read_description
from glad_core.bundle.model import Model, is_half, load_bundle, load_vit, save_derived
from glad_core.calibration import Calibrator, judged_images
from pipelines.models.find import local_bundle
from pipelines.train.good_images import Survey, read_pixels
from pipelines.train.side_by_side import tell
from pipelines.train.spec import FINAL, Deliver, Outcome, TrainJob


def finish(job: TrainJob, seen: Survey, checkpoint: Any, deliver: Deliver, events: Any) -> Outcome:
    """Make the bundle from a run's last checkpoint and deliver it. Runs as a Ray task."""
    torch.set_num_threads(job.threads)
    base = local_bundle(job.base, job.storage)
    model = load_bundle(base, job.device)
    with checkpoint.as_directory() as folder:
        model = with_weights(model, job, load_file(Path(folder) / FINAL))
    if is_half(base):
        model.unet.half().float()  # calibrate what will be stored
        model.vae.half().float()
    held_out = read_pixels(seen.held_out, model.settings.resolution, job.storage)
    total, done = judged_images(len(held_out)), 0

    def judged(count: int) -> None:
        nonlocal done
        done += count
        tell(events, job.name, "calibrate", done=done, total=total)

    calibrator = Calibrator(model, foreground_mode=job.recipe.foreground_mode, seed=job.recipe.seed, on_image=judged)
    settings = calibrator.calibrate(held_out, [image.category for image in seen.held_out], job.target_fpr)
    description = read_description(base)
    provenance = {
        "run": job.run_id(seen),
        "base": description.model_id,
        "part": job.part,
        "dataset_fingerprint": seen.fingerprint,
        "good_images": len(seen.fit),
        "held_out_images": len(seen.held_out),
        "skipped_images": len(seen.skipped),
        "target_fpr": job.target_fpr,
        # The UNet's recipe is what the next training starts from, whatever part was trained last.
        "recipe": description.provenance.get("recipe", {}),
        ("recipe" if job.part == "unet" else f"{job.part}_recipe"): job.recipe.model_dump(),
    }
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "bundle"
        save_derived(made, base, model, settings, category=",".join(job.categories), provenance=provenance)
        tell(events, job.name, "deliver")
        return deliver(made, job, seen)


def with_weights(model: Model, job: TrainJob, weights: dict[str, torch.Tensor]) -> Model:
    """``model`` with the trained part; `glad_core.training.losses` names the parts."""
    part = partial(_below, weights)
    if job.part == "vae":
        model.vae.load_state_dict(part("vae."))
        return model
    if job.part == "dino":
        adapted = load_vit(local_bundle(job.base, job.storage) / "features", model.device)
        adapted.load_state_dict(part("vit."))
        return replace(model, final_features=adapted)
    model.unet.load_state_dict(part("unet."))
    if len(job.categories) == 1:
        return model
    prompts = dict(zip(job.categories, weights["prompts"].to(model.device).split(1), strict=True))
    return replace(model, prompts=model.prompts | prompts)


def _below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
