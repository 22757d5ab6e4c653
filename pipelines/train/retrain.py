"""`glad retrain`: train, calibrate and check many categories side by side; better models go live in a registry.

Every category is one `run_training` task, so a failure of one does not touch the others, and the same command given
again trains only what is missing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import session
from cluster.storage import Storage, absolute, join
from glad_core.errors import GladError
from pipelines.archive import layouts
from pipelines.models import registry
from pipelines.models.find import local_bundle
from pipelines.train.good_images import apply_feedback, good_images
from pipelines.train.job import run_training
from pipelines.train.kept_frames import DATA_CPUS, read_frames
from pipelines.train.plan import TrainRequest, claim_work, plan_job, with_resources
from pipelines.train.side_by_side import run_side_by_side
from pipelines.train.spec import Outcome, TrainJob, clear_work
from pipelines.train.survey import Survey

if TYPE_CHECKING:
    from glad_core.model_comparison import ModelComparison

WORK = ".work"  # in the registry: runs under way; a leading dot, so it is no category


@dataclass(frozen=True)
class RetrainRequest:
    """The options of `glad retrain`; ``train`` are those it shares with `glad train`, whose ``out`` is the registry.

    ``by_category`` holds what a file says of single categories: fields of ``train`` that win over the common ones; a
    ``recipe`` is added to the common one.
    """

    train: TrainRequest
    max_parallel: int | None = None
    promote: Literal["always", "gate", "never"] = "gate"
    margin: float = 0.02
    by_category: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, category: str) -> TrainRequest:
        """The request to train one category."""
        own = dict(self.by_category.get(category, {}))
        return replace(self.train, recipe=self.train.recipe | own.pop("recipe", {}), **own)


def retrain(request: RetrainRequest, console: Console) -> bool:
    """Retrain the categories; returns whether none of them failed.

    Raises:
        GladError, StorageError, SessionError: a mistake in the request, one line, before any work.
    """
    storage = Storage.from_environment()
    home = absolute(request.train.out)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    images = good_images(request.train.dataset, request.train.category or "all", storage, say=say)
    images, changes = apply_feedback(images, request.train.exclude, request.train.include, storage)
    if changes:
        say(changes)
    jobs = _plan(request, images, storage)
    claim_work(storage, join(home, WORK))
    session.connect(
        request.train.address,
        reads=[absolute(request.train.dataset), *{job.base for job in jobs.values()}],
        writes=[home],
    )
    parallel = parallel_jobs(request, session.resources(), len(jobs))
    deliver = partial(publish_and_promote, storage=storage, home=home, promote=request.promote, margin=request.margin)
    prepare = partial(find_earlier, storage=storage, home=home)
    tasks = {}
    for name, job in jobs.items():
        sized = with_resources(job, request.train, parallel)
        tasks[name] = partial(run_training, sized, {name: images[name]}, deliver, prepare=prepare)
    console.print(f"{len(tasks)} categories, {parallel} at a time", highlight=False)
    outcomes = run_side_by_side(tasks, parallel, console)
    _print_outcomes(outcomes, console)
    return not any(isinstance(outcome, BaseException) for outcome in outcomes.values())


def _plan(request: RetrainRequest, images: Collection[str], storage: Storage) -> dict[str, TrainJob]:
    """The job of every category. A category that only the file knows must be one of the dataset that is not trained."""
    others = [name for name in request.by_category if name not in images]
    if others:
        try:
            layouts.good_images(request.train.dataset, ",".join(others), storage)
        except GladError as error:
            raise GladError(f"--settings names a category that there is not: {error}") from error
    jobs = {}
    for name in images:
        try:
            jobs[name] = plan_job(request.of(name), [name], storage, name=name, work="")
        except GladError as error:
            raise GladError(f"{name}: {error}" if name in request.by_category else str(error)) from error
    return jobs


def _print_outcomes(outcomes: dict[str, Any], console: Console) -> None:
    table = Table("category", "outcome", "version")
    for name, outcome in outcomes.items():
        if isinstance(outcome, BaseException):
            table.add_row(escape(name), f"[red]failed: {escape(' '.join(str(outcome).split())[:400])}[/red]", "-")
        else:
            table.add_row(escape(name), escape(outcome.words), outcome.model_id)
    console.print(table)


def parallel_jobs(request: RetrainRequest, available: dict[str, float], jobs: int) -> int:
    """Number of categories at a time: as requested, but no more than fit, or all would wait for each other."""
    workers = request.train.workers
    gpus = session.gpus(available)
    if request.train.device == "cuda" or (request.train.device is None and gpus):
        fitting = int(gpus // workers)
    else:
        fitting = int((available.get("CPU", 1.0) - DATA_CPUS) / (0.5 * workers))
    return max(1, min(jobs, fitting, request.max_parallel or jobs))


def find_earlier(job: TrainJob, surveyed: Survey, *, storage: Storage, home: str) -> TrainJob | Outcome:
    """The outcome of an identical run on the same images, if the registry holds one; else the job with its folder."""
    run_id = job.run_id(surveyed)
    for version in registry.versions(home, job.name, storage):
        if registry.description(home, job.name, version, storage).provenance.get("run") == run_id:
            return Outcome("up to date", version)
    return replace(job, work=join(home, WORK, job.name, run_id))


def publish_and_promote(
    bundle: Path, job: TrainJob, surveyed: Survey, *, storage: Storage, home: str, promote: str, margin: float
) -> Outcome:
    """Add the bundle to the registry and make it current, if ``promote`` allows."""
    version = registry.publish(bundle, home, job.name, storage)
    before = registry.current(home, job.name, storage)
    words = "trained, not promoted"
    if promote == "always" or (promote == "gate" and before is None):
        registry.promote(home, job.name, version, storage, "first version" if before is None else "always")
        words = "promoted"
    elif promote == "gate" and before is not None:
        comparison = _compare(bundle, join(home, job.name, before.version), job, surveyed, margin)
        words = f"kept {before.version}: {comparison.describe()}"
        if comparison.passed:
            registry.promote(home, job.name, version, storage, comparison.describe())
            words = f"promoted: {comparison.describe()}"
    clear_work(storage, job.work, join(home, job.name, version))
    storage.delete_folder(join(home, WORK, job.name))  # unfinished runs on other images
    return Outcome(words, version)


def _compare(bundle: Path, before: str, job: TrainJob, surveyed: Survey, margin: float) -> ModelComparison:
    """The new bundle against the current one, on the same held-out good images and synthetic anomalies."""
    from glad_core.bundle.model import load_bundle
    from glad_core.model_comparison import compare_models
    from glad_core.pictures import all_framings

    new, old = (load_bundle(path, job.device) for path in (bundle, local_bundle(before, job.storage)))
    framings = all_framings(new.settings, old.settings)
    good = list(read_frames(surveyed.held_out, framings, job.storage))
    names = [image.uri for image in surveyed.held_out]
    return compare_models(new, old, good, job.recipe.foreground_mode, margin, names=names)
