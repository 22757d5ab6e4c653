"""`glad calibrate`: T, δ, min_step and the decision threshold from good images alone.

T and δ are chosen on a few images (`glad_core.calibration`); the threshold comes from the scores of all of them, which
the scoring job computes on Ray like any archive's.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import torch
from rich.console import Console
from rich.markup import escape

from cluster import session
from cluster.storage import Storage, StorageError, is_s3, join, local_path
from glad_core.bundle.glad_json import read_description, update_settings
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Profile, Settings
from glad_core.calibration import Calibrator, conformal_quantile, images_needed, judged_images
from glad_core.engine.process import set_up
from glad_core.errors import GladError
from glad_core.foreground import ForegroundMode
from pipelines.archive.decode import ImageError, decode, fetch
from pipelines.archive.sources import list_source
from pipelines.models.find import SMALL, local_bundle
from pipelines.runs.feedback import require_marks
from pipelines.runs.run import Run
from pipelines.runs.schema import RESULTS, read_run
from pipelines.score.actor_plan import ActorWishes, plan_actors
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest

STEP_IMAGES = 40  # images that T, δ and min_step are chosen on


@dataclass(frozen=True)
class CalibrateRequest:
    """What `glad calibrate` was asked; ``source`` holds good images only, ``run`` a finished run over good images."""

    source: str | None
    run: str | None
    model: str
    out: Path
    target_fpr: float
    threshold_only: bool
    foreground_mode: ForegroundMode
    profile: Profile | None = None  # as the bundle has it
    feedback: bool = False  # ``run`` is any run, whose alarms people have looked at
    seed: int = 0
    address: str | None = None


def calibrate(request: CalibrateRequest, console: Console) -> str:
    """Write the calibrated bundle and return its model id.

    Raises:
        GladError, StorageError, SessionError: nothing to calibrate on, ``out`` exists, too few images for the target.
    """
    storage = Storage.from_environment()
    if request.threshold_only and request.profile is not None:
        raise GladError("--threshold-only keeps T and the profile: leave out --profile or --threshold-only")
    if request.feedback and request.run is None:
        raise GladError("--feedback needs --run, the run whose alarms were marked in `glad view`")
    if request.out.exists():
        raise GladError(f"{request.out} already exists: choose another --out or remove it")
    base = local_bundle(request.model, storage)
    description = read_description(base)
    settings = Settings.parse(description.settings, str(base))
    needed = images_needed(request.target_fpr)
    with tempfile.TemporaryDirectory(dir=_parent(request.out)) as folder:
        made = Path(folder) / "bundle"
        shutil.copytree(base, made)
        run = request.run
        if run is None:
            assert request.source is not None
            if not request.threshold_only:
                known_anywhere = is_s3(request.model) or request.model == SMALL
                settings = _steps(request, request.model if known_anywhere else str(base), settings, storage, console)
                update_settings(made, settings, {})
            run = str(Path(folder) / "run")
            score(
                ScoreRequest(request.source, run, model=str(made), seed=request.seed, address=request.address), console
            )
        elif not request.threshold_only:
            raise GladError("a finished run fixes T and δ: add --threshold-only, or give the good images themselves")
        scores, judged_by, defects = _scores(run, storage, request.feedback)
        if request.run is not None and judged_by != {description.model_id}:
            raise GladError(f"{run} was scored by {', '.join(sorted(judged_by))}, --model is {description.model_id}")
        if len(scores) < needed:
            raise GladError(
                f"{len(scores)} good images: a false-positive rate of {request.target_fpr:g} needs at least {needed}; "
                f"give more images or a --target-fpr of at least {1 / (len(scores) + 1):.3g}"
            )
        threshold = conformal_quantile(scores, request.target_fpr)
        provenance = {"target_fpr": request.target_fpr, "calibration_images": len(scores)}
        model_id = update_settings(made, settings.model_copy(update={"threshold": threshold}), provenance)
        made.rename(request.out)
    if request.feedback:
        lost = sum(score <= threshold for score in defects)
        before = "none" if settings.threshold is None else f"{settings.threshold:.4g}"
        console.print(
            f"threshold was {before}; of {len(defects)} confirmed anomalies {lost} do not exceed the new one",
            highlight=False,
        )
    steps = f"T {settings.start_step}"
    if settings.profile == "exact":
        steps += f", δ {settings.delta:.4g}, min_step {settings.min_step}"
    console.print(
        f"{steps}; threshold {threshold:.4g} "
        f"from {len(scores)} good images: a new good image exceeds it with probability at most {request.target_fpr:g}",
        highlight=False,
        soft_wrap=True,
    )
    return model_id


def _steps(request: CalibrateRequest, base: str, settings: Settings, storage: Storage, console: Console) -> Settings:
    """T, δ and min_step from up to `STEP_IMAGES` good images, evenly spread over the source.

    They are chosen by a task with an actor's resources: on a GPU where there is one, else with this machine's cores.
    """
    assert request.source is not None
    source = request.source if is_s3(request.source) else local_path(request.source)
    rows = [row for row in list_source(source, None, storage) if row.get("error_type") is None]
    if not rows:
        raise GladError(f"{source}: no images in it; name a folder, glob, list or tar of good images")
    places = np.linspace(0, len(rows) - 1, min(len(rows), STEP_IMAGES)).round().astype(int)
    few = [rows[place] for place in places]
    session.connect(request.address)
    import ray

    weights = sum(entry.size for entry in read_description(local_bundle(base, storage)).files.values())
    room = plan_actors(session.resources(), ActorWishes(address=request.address), weights)
    gpu = room.num_gpus > 0
    cpus = max(session.node_cpus()) if request.address is None and not gpu else room.num_cpus
    profile = request.profile or settings.profile
    console.print(
        f"choosing T and δ on {len(few)} of {len(rows)} images, {judged_images(len(few), profile) - len(few)} "
        f"reconstructions on {'a GPU' if gpu else f'{cpus:g} CPUs'}",
        highlight=False,
    )
    task: Any = ray.remote(num_cpus=cpus, num_gpus=room.num_gpus)(steps_from)
    options = (profile, request.foreground_mode, request.seed)
    try:
        with console.status(""):
            chosen, skipped = ray.get(task.remote(few, base, storage, gpu, *options))
    except ray.exceptions.RayError as error:
        raise session.root_cause(error, GladError, StorageError) from None
    for message in skipped:
        console.print(f"[yellow]{escape(message)}; skipped[/yellow]", soft_wrap=True)
    return chosen


def steps_from(
    rows: list[dict[str, Any]],
    base: str,
    storage: Storage,
    gpu: bool,
    profile: Profile,
    foreground_mode: ForegroundMode,
    seed: int,
) -> tuple[Settings, list[str]]:
    """The settings with T, δ and min_step chosen on listed good images, and what is wrong with unreadable ones.

    Raises:
        GladError: none can be read.
    """
    set_up(gpu, torch.get_num_threads())  # as many as Ray gives the task, or OMP_NUM_THREADS
    model = load_bundle(local_bundle(base, storage), device="cuda" if gpu else "cpu")
    good: list[np.ndarray] = []
    skipped: list[str] = []
    for row in rows:
        try:
            good.append(decode(fetch(storage, row), model.settings.resolution).pixels)
        except ImageError as error:
            skipped.append(f"{row['uri']}: {error}")
    if not good:
        raise GladError(f"none of the good images can be read; the first: {skipped[0]}")
    return Calibrator(model, profile, foreground_mode, seed=seed).choose_steps(good), skipped


def _scores(run: str, storage: Storage, with_feedback: bool) -> tuple[list[float], set[str], list[float]]:
    """The scores of a finished run's good images, the models that gave them, and the scores of confirmed anomalies.

    With feedback every image that nobody confirmed as anomalous is good, so all alarms must have been looked at: to
    take only those marked would leave out the good images that score highest, or count defects as good.
    """
    folder = run.rstrip("/") if is_s3(run) else local_path(run)
    read_run(folder, storage)
    filesystem, path = storage.resolve(join(folder, RESULTS))
    columns = ["score", "model_id", "image_id", "is_anomalous"]
    table = pads.dataset(path, filesystem=filesystem).to_table(columns=columns)
    judged_by = set(table["model_id"].to_pylist())
    if not with_feedback:
        return table["score"].to_pylist(), judged_by, []
    said = {row["image_id"]: row["verdict"] for row in require_marks(Run(folder, storage))}
    rows = table.to_pylist()
    alarms = [row["image_id"] for row in rows if row["is_anomalous"]]
    unmarked = sum(image_id not in said for image_id in alarms)
    if unmarked:
        raise GladError(
            f"{run}: {unmarked} of {len(alarms)} alarms are not marked yet; mark them with `glad view {run}`"
        )
    good: list[float] = []
    defects: list[float] = []
    for row in rows:
        (defects if said.get(row["image_id"]) == "confirmed" else good).append(row["score"])
    return good, judged_by, defects


def _parent(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GladError(f"cannot write {out.parent}: {error.strerror}; choose another --out") from error
    return out.parent
