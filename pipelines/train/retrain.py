"""`glad retrain`: train, calibrate and check many categories side by side; the better models go live in a registry.

Every category is one `train.run_training` task, so one's failure does not touch the others, and the same command again
does only what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import session
from cluster.storage import Storage, absolute, join
from pipelines.models import registry
from pipelines.models.find import local_bundle
from pipelines.train.good_images import DATA_CPUS, Survey, good_images, read_pixels
from pipelines.train.job import TrainRequest, claim_work, plan_job, run_training, with_resources
from pipelines.train.side_by_side import follow
from pipelines.train.spec import Outcome, TrainJob, clear_work

if TYPE_CHECKING:
    from glad_core.model_comparison import ModelComparison

WORK = ".work"  # in the registry: runs under way; a leading dot, so it is no category


@dataclass(frozen=True)
class RetrainRequest:
    """What `glad retrain` was asked; ``train`` holds what it shares with `glad train`, its ``out`` is the registry."""

    train: TrainRequest
    max_parallel: int | None = None
    promote: Literal["always", "gate", "never"] = "gate"
    margin: float = 0.02


def retrain(request: RetrainRequest, console: Console) -> bool:
    """Retrain the categories; returns whether all of them worked.

    Raises:
        GladError, StorageError, SessionError: a mistake in what was asked, one line, before any work.
    """
    storage = Storage.from_environment()
    home = absolute(request.train.out)
    found = good_images(request.train.dataset, request.train.category or "all", storage)
    jobs = {name: plan_job(request.train, [name], storage, name=name, work="") for name in found}
    claim_work(storage, join(home, WORK))
    session.connect(request.train.address)
    parallel = parallel_jobs(request, session.resources(), len(jobs))
    deliver = partial(publish_and_promote, storage=storage, home=home, promote=request.promote, margin=request.margin)
    prepare = partial(look_up, storage=storage, home=home)
    tasks = {}
    for name, job in jobs.items():
        sized = with_resources(job, request.train, parallel)
        tasks[name] = partial(run_training, sized, {name: found[name]}, deliver, prepare=prepare)
    console.print(f"{len(tasks)} categories, {parallel} at a time", highlight=False)
    outcomes = follow(tasks, parallel, console)
    table = Table("category", "outcome", "version")
    for name, outcome in outcomes.items():
        if isinstance(outcome, BaseException):
            table.add_row(name, f"[red]failed: {escape(' '.join(str(outcome).split())[:400])}[/red]", "-")
        else:
            table.add_row(name, escape(outcome.words), outcome.model_id)
    console.print(table)
    return not any(isinstance(outcome, BaseException) for outcome in outcomes.values())


def parallel_jobs(request: RetrainRequest, available: dict[str, float], jobs: int) -> int:
    """How many categories at a time: what was asked, but never more than fit, or all would wait for each other."""
    workers = request.train.workers
    gpus = session.gpus(available)
    if request.train.device == "cuda" or (request.train.device is None and gpus):
        fitting = int(gpus // workers)
    else:
        fitting = int((available.get("CPU", 1.0) - DATA_CPUS) / (0.5 * workers))
    return max(1, min(jobs, fitting, request.max_parallel or jobs))


def look_up(job: TrainJob, seen: Survey, *, storage: Storage, home: str) -> TrainJob | Outcome:
    """The outcome of an earlier run that trained the same on the same images, if there is one; else where to work."""
    wanted = job.run_id(seen)
    for version in registry.versions(home, job.name, storage):
        if registry.description(home, job.name, version, storage).provenance.get("run") == wanted:
            return Outcome("up to date", version)
    return replace(job, work=join(home, WORK, job.name, wanted))


def publish_and_promote(
    made: Path, job: TrainJob, seen: Survey, *, storage: Storage, home: str, promote: str, margin: float
) -> Outcome:
    """Add the bundle to the registry and, if it may, make it current."""
    version = registry.publish(made, home, job.name, storage)
    before = registry.current(home, job.name, storage)
    words = "trained, not promoted"
    if promote == "always" or (promote == "gate" and before is None):
        registry.promote(home, job.name, version, storage, "first version" if before is None else "always")
        words = "promoted"
    elif promote == "gate" and before is not None:
        verdict = _gate(made, join(home, job.name, before.version), job, seen, margin)
        words = f"kept {before.version}: {verdict.describe()}"
        if verdict.passed:
            registry.promote(home, job.name, version, storage, verdict.describe())
            words = f"promoted: {verdict.describe()}"
    clear_work(storage, job.work, join(home, job.name, version))
    storage.delete_folder(join(home, WORK, job.name))  # runs on other images that never ended
    return Outcome(words, version)


def _gate(made: Path, before: str, job: TrainJob, seen: Survey, margin: float) -> ModelComparison:
    """New against current on the same held-out good images and synthetic anomalies."""
    from glad_core.bundle.model import load_bundle
    from glad_core.model_comparison import compare_models

    new, old = (load_bundle(place, job.device) for place in (made, local_bundle(before, job.storage)))
    good_new, good_old = (read_pixels(seen.held_out, model.settings.resolution, job.storage) for model in (new, old))
    return compare_models(new, old, good_new, good_old, job.recipe.foreground_mode, margin)
