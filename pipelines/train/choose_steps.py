"""`glad calibrate`'s choice of the denoising steps: a task on some of the good images, with an actor's resources."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from cluster import session
from cluster.storage import Storage
from glad_core.bundle.glad_json import Description
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Profile, Settings
from glad_core.calibration import Calibrator, compared_framings, judged_images
from glad_core.decoding.picture import ImageError, decode
from glad_core.engine.process import set_up
from glad_core.errors import GladError
from glad_core.foreground import ForegroundMode
from glad_core.views import Frames
from pipelines.archive.fetch import fetch, neighbours
from pipelines.archive.sources import list_source
from pipelines.models.find import local_bundle
from pipelines.score.actor_plan import ActorWishes, plan_actors
from pipelines.train.side_by_side import count_judged, run_side_by_side

NAME = "calibrate"  # of the one job whose progress is shown
STEP_IMAGES = 40  # images that the denoising steps are chosen on


def good_images(source: str, category: str, storage: Storage) -> list[dict[str, Any]]:
    """Rows of the images that can be judged: of a bundle for several categories, those of its own."""
    several = "," in category
    rows = [row for row in list_source(source, None, storage, several) if row.get("error_type") is None]
    if not rows:
        raise GladError(f"{source}: no images in it; name a folder, glob, list or tar of good images")
    rows = [row for row in rows if not several or row["category"] in category.split(",")]
    if not rows:
        raise GladError(f"{source}: no image of {category}, which the bundle is for: name its folders like them")
    return rows


def choose_steps(
    rows: list[dict[str, Any]],
    base: str,
    description: Description,
    storage: Storage,
    console: Console,
    *,
    profile: Profile | None,
    foreground_mode: ForegroundMode,
    seed: int,
    address: str | None,
) -> Settings:
    """T, δ and min_step from up to `STEP_IMAGES` good images, evenly spread over the source.

    A task with an actor's resources chooses them: on a GPU if there is one, else with this machine's cores. Without a
    ``profile`` the bundle's is kept.

    Raises:
        GladError: as `steps_from`.
    """
    import ray

    few = [rows[index] for index in np.linspace(0, len(rows) - 1, min(len(rows), STEP_IMAGES)).round().astype(int)]
    storage = storage.patient()
    weights = sum(entry.size for entry in description.files.values())
    actors = plan_actors(session.resources(), ActorWishes(address=address), weights)
    gpu = actors.num_gpus > 0
    cpus = max(session.node_cpus()) if address is None and not gpu else actors.num_cpus
    profile = profile or Settings.parse(description.settings, base).profile
    console.print(
        f"choosing the denoising steps on {len(few)} of {len(rows)} images on {'a GPU' if gpu else f'{cpus:g} CPUs'}",
        highlight=False,
    )
    task: Any = ray.remote(num_cpus=cpus, num_gpus=actors.num_gpus)(steps_from)
    arguments = (few, base, description.model_id, storage, gpu, profile, foreground_mode, seed)
    job = {NAME: lambda events: ray.get(task.remote(*arguments, events))}
    outcome = run_side_by_side(job, 1, console)[NAME]
    if isinstance(outcome, BaseException):
        raise outcome
    chosen, skipped = outcome
    for message in skipped:
        console.print(f"[yellow]{escape(message)}; skipped[/yellow]", soft_wrap=True)
    return chosen


def steps_from(
    rows: list[dict[str, Any]],
    bundle: str,
    model_id: str,
    storage: Storage,
    gpu: bool,
    profile: Profile,
    foreground_mode: ForegroundMode,
    seed: int,
    events: Any,
) -> tuple[Settings, list[str]]:
    """The settings with T, δ and min_step chosen on listed good images, and one line for each unreadable one.

    ``events`` is the queue of what the user sees (`side_by_side`).

    Raises:
        GladError: none can be read, or another bundle than ``model_id`` is there.
    """
    set_up(gpu, torch.get_num_threads())  # as many as Ray gives the task, or OMP_NUM_THREADS
    model = load_bundle(local_bundle(bundle, storage), device="cuda" if gpu else "cpu", model_id=model_id)
    framings = compared_framings(model.settings, methods=False)
    good: list[Frames] = []
    names: list[str] = []
    categories: list[str] = []
    skipped: list[str] = []
    for row in rows:
        try:
            picture = decode(fetch(storage, row, partial(neighbours, row, rows)), framings)
            good.append(Frames(picture.frames, (picture.height, picture.width)))
            names.append(row["uri"])
            categories.append(row["category"] if model.prompts else model.category)
        except ImageError as error:
            skipped.append(f"{row['uri']}: {error}")
    if not good:
        raise GladError(f"none of the good images can be read; the first: {skipped[0]}")
    progress = count_judged(events, NAME, "choose steps", judged_images(good, model.settings, profile))
    calibrator = Calibrator(model, profile, foreground_mode, seed=seed, on_image=progress)
    return calibrator.choose(good, categories, names).settings, skipped
