"""The end of a training run: put trained weights into the base, calibrate on the held-out images, deliver."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from glad_core.bundle.glad_json import Description, read_description
from glad_core.bundle.model import Model, final_folder, is_half, load_backbone, load_bundle, save_derived
from glad_core.calibration import METHODS_MARGIN, Calibrator, Choice, compared_framings, judged_images
from glad_core.errors import GladError
from glad_core.good_patches import GoodPatches, GoodPicture, remember
from pipelines.models.find import local_bundle
from pipelines.score.patch_memory import MAX_BYTES, MAX_IMAGES
from pipelines.train.choose_views import usual_size
from pipelines.train.failure import out_of_memory
from pipelines.train.kept_frames import read_frames
from pipelines.train.side_by_side import count_judged, send_event
from pipelines.train.spec import FINAL, Deliver, Outcome, TrainJob
from pipelines.train.survey import Survey


def finish(job: TrainJob, surveyed: Survey, checkpoint: Any, deliver: Deliver, events: Any) -> Outcome:
    """Make the bundle from a run's last checkpoint, calibrate and deliver it. Runs as a Ray task.

    Raises:
        GladError: the device has too little memory, or a number is not finite.
    """
    try:
        return _finish(job, surveyed, checkpoint, deliver, events)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise GladError(
            f"{job.name}: the device has too little memory to calibrate what was trained; the training is kept: give "
            "the same command again with --device cpu"
        ) from error


def _finish(job: TrainJob, surveyed: Survey, checkpoint: Any, deliver: Deliver, events: Any) -> Outcome:
    torch.set_num_threads(job.threads)
    base = local_bundle(job.base, job.storage)
    model = load_bundle(base, job.device, model_id=job.base_id)
    with checkpoint.as_directory() as folder:
        model = with_weights(model, job, load_file(Path(folder) / FINAL))
    if is_half(base):
        model.unet.half().float()  # calibrate what will be stored
        model.vae.half().float()
    settings = model.settings.judged_by("glad")
    levels = {"white_level": surveyed.white_level, "dark_level": surveyed.dark_level}
    model = replace(model, settings=settings.model_copy(update={"views": job.views or settings.views, **levels}))
    choose = "preset" not in read_description(base).provenance  # whose method is the published one
    held_out = list(read_frames(surveyed.held_out, compared_framings(model.settings, choose), job.storage))
    if choose:
        send_event(events, job.name, "remember good patches")
    patches = _remember(job, model, surveyed) if choose else None
    judged = count_judged(events, job.name, "calibrate", judged_images(held_out, model.settings, patches=patches))
    calibrator = Calibrator(model, foreground_mode=job.recipe.foreground_mode, seed=job.recipe.seed, on_image=judged)
    categories, names = zip(*((image.category, image.uri) for image in surveyed.held_out), strict=True)
    choice = calibrator.calibrate(held_out, categories, job.target_fpr, names, patches)
    settings = choice.settings.model_copy(update={"picture_size": usual_size(surveyed.shapes)})
    judging = patches if settings.method == "nearest" else None
    model = replace(model, memory=[judging.memory[view] for view in choice.views] if judging else [])
    provenance = _provenance(job, surveyed, read_description(base)) | {"good_scores": choice.good_scores}
    provenance |= {"calibration_images": len(choice.scores)} if judging else {}
    if patches and patches.doubt:
        send_event(events, job.name, "calibrate", warning=patches.doubt)
        provenance |= {"threshold_doubt": patches.doubt}
    if choose:
        provenance |= _methods(choice)
        send_event(events, job.name, "calibrate", warning=_chosen(choice))
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        save_derived(bundle, base, model, settings, category=",".join(job.categories), provenance=provenance)
        send_event(events, job.name, "deliver")
        return deliver(bundle, job, surveyed)


def _remember(job: TrainJob, model: Model, surveyed: Survey) -> GoodPatches:
    """The patches of training pictures, evenly spread; held-out pictures are judged by them too."""
    model = replace(model, settings=model.settings.judged_by("nearest"))
    images, held_out, framings = job.images, surveyed.held_out, model.settings.framings()
    spread = np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).astype(int)
    # In random order, so that those that fit into memory are spread too.
    fit = [images[index] for index in np.random.default_rng(job.recipe.seed).permutation(spread)]
    pictures: list[GoodPicture] = []
    held = 0
    for image, frames in zip(chain(held_out, fit), read_frames([*held_out, *fit], framings, job.storage), strict=True):
        trained = len(pictures) >= len(held_out)
        pictures.append(GoodPicture(image.uri, image.category, frames, remembered=trained))
        held += sum(frame.nbytes for frame in frames.frames)
        if held > MAX_BYTES and trained:
            break
    return remember(model, pictures, job.recipe.seed)


def _provenance(job: TrainJob, surveyed: Survey, base: Description) -> dict[str, Any]:
    return {
        "run": job.run_id(surveyed),
        "base": base.model_id,
        "part": job.part,
        "dataset_fingerprint": surveyed.fingerprint,
        "good_images": len(surveyed.fit),
        "held_out_images": len(surveyed.held_out),
        "skipped_images": len(surveyed.skipped),
        "target_fpr": job.target_fpr,
        # The next training starts from the UNet's recipe, whichever part was trained last.
        "recipe": base.provenance.get("recipe", {}),
        ("recipe" if job.part == "unet" else f"{job.part}_recipe"): job.recipe.model_dump(),
    }


def _methods(choice: Choice) -> dict[str, Any]:
    """The method chosen, and how well each one separated with which settings."""
    return {
        "method": choice.name,
        "methods": {name: quality.auroc for name, quality in choice.qualities.items()},
        "method_pictures": {name: quality.pictures for name, quality in choice.qualities.items()},
        "method_settings": {name: settings.model_dump(mode="json") for name, settings in choice.compared.items()},
    }


def _chosen(choice: Choice) -> str:
    found = ", ".join(f"{name} {auroc:.3f} on {n} pictures" for name, (auroc, _, n) in choice.qualities.items())
    if choice.qualities[choice.name] < max(choice.qualities.values()):
        found += f"; none is better by more than {METHODS_MARGIN:g}"
    return f"judged by {choice.name} (AUROC of synthetic anomalies: {found})"


def with_weights(model: Model, job: TrainJob, weights: dict[str, torch.Tensor]) -> Model:
    """``model`` with the trained part; `glad_core.training.losses` names the parts."""
    part = partial(_below, weights)
    if job.part == "vae":
        model.vae.load_state_dict(part("vae."))
        return model
    if job.part == "dino":
        base = local_bundle(job.base, job.storage)
        adapted = load_backbone(base / final_folder(base), model.device)
        adapted.load_state_dict(part("backbone."))
        return replace(model, final_features=adapted)
    model.unet.load_state_dict(part("unet."))
    if len(job.categories) == 1:
        return model
    prompts = dict(zip(job.categories, weights["prompts"].to(model.device).split(1), strict=True))
    return replace(model, prompts=model.prompts | prompts)


def _below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
