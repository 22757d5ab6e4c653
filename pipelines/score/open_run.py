"""The start of a scoring job: check the request, then list the archive, or read the list of the run that is resumed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from filelock import FileLock, Timeout

from cluster import session
from cluster.storage import Storage, StorageError, absolute
from glad_core.engine.search import search_of
from glad_core.errors import GladError
from pipelines.archive import sources
from pipelines.archive.earlier import BEING_WRITTEN, CHANGED
from pipelines.archive.layouts import choose_category
from pipelines.archive.listing import Listed, list_remotely
from pipelines.models.find import Models, find_models
from pipelines.runs.claim import Found, Plan, claim, draft, memory_file
from pipelines.runs.commits import Written, recover
from pipelines.runs.run import Run
from pipelines.runs.schema import MANIFEST
from pipelines.score.actor import KEPT_MODELS, ActorSettings
from pipelines.score.actor_plan import ActorPlan, plan_actors
from pipelines.score.batch_sizes import rows_and_shards, usual_pixels
from pipelines.score.notify import check_notify
from pipelines.score.record import identity
from pipelines.score.request import NothingNew, ScoreRequest


@dataclass(frozen=True)
class Job:
    """A checked request: the run folder to write, the archive's absolute location, the bundles, and the identity."""

    request: ScoreRequest
    run: Run
    source: str
    models: Models
    identity: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """What is known once the archive is listed: the plan, the actors, and the shards that are committed already."""

    plan: Plan
    actors: ActorPlan
    commits: dict[int, Written]

    def memory(self, run: Run) -> str | None:
        """Where the good patches of the nearest method are."""
        return None if self.plan.memory is None else run.path(self.plan.memory)


def check(request: ScoreRequest) -> Job:
    """Find every mistake in the request that can be found without a model or an image in memory.

    Raises:
        GladError, StorageError: one line about the mistake.
    """
    storage = Storage.from_environment()
    run, source = Run.at(request.out, storage), absolute(request.source)
    if request.new and request.overwrite:
        raise GladError("--new adds to a run and --overwrite replaces it: give one of them")
    if request.notify is not None:
        check_notify(request.notify)
    if source == run.location or run.location.startswith(source.rstrip("/") + "/"):
        raise GladError(f"{run.location} lies inside the archive {source}: choose an --out outside of it")
    models = find_models(request.model, storage)
    if models.categories and request.category is not None:
        choose_category(models.categories, request.category, request.model)
    searches = {key: search_of(settings, request.search) for key, settings in models.settings().items()}
    if (request.method == "nearest") != (request.good is not None):
        raise GladError("--method nearest and --good FOLDER go together: it compares with those good images")
    if request.method == "nearest" and "" not in models.bundles:
        raise GladError(f"{request.model} is a registry: --method nearest takes one bundle, for its features")
    if request.method == "nearest":
        models = models.by_nearest()
    if storage.kind(source) == "none" and not sources.WILDCARDS.search(source):
        raise GladError(f"{source}: no such file or folder; name a folder, a glob, a list of URIs or tar shards")
    return Job(request, run, source, models, identity(request, source, models, searches))


def open_run(job: Job, found: Found, say: Callable[[str], None]) -> Opened:
    """Connect to Ray, plan the actors, list the archive and claim the run folder, unless there is a run to resume.

    Args:
        found: what `claim.find_own` found in the run folder.
        say: gets a line on the good images of the nearest method.

    Raises:
        GladError, StorageError, SessionError: one line.
    """
    actors = _connect(job)
    plan = found.plan or claim(job.run, found.generation + 1, partial(_list, job, actors, say))
    plan, commits = recover(job.run, plan)
    return Opened(plan, actors, commits)


def open_new(job: Job, plan: Plan) -> Opened:
    """List what has come since the listings of a complete run, and add it to the run.

    Raises:
        NothingNew: there is none.
        GladError, StorageError, SessionError: one line.
    """
    actors = _connect(job)
    grown = claim(job.run, plan.generation + 1, partial(_list_new, job, actors, plan), plan.base)
    grown, commits = recover(job.run, grown)
    return Opened(grown, actors, commits)


@contextmanager
def one_at_a_time(run: Run) -> Iterator[None]:
    """Keep other `glad score --new` on this machine from working on the run. The lock ends with the process.

    Two on different machines lose and double nothing either, but both compute.

    Raises:
        NothingNew: there is such a command.
    """
    name = hashlib.sha256(run.location.encode()).hexdigest()[:16]
    lock = FileLock(Path(gettempdir(), f"glad-{os.getuid()}-{name}.lock"))
    try:
        held = lock.acquire(blocking=False)
    except Timeout as error:
        raise NothingNew("another `glad score --new` is at work on this run, so this one judges nothing") from error
    with held:
        yield


def _connect(job: Job) -> ActorPlan:
    reads = [job.source, *job.models.bundles.values()]
    if job.request.good is not None:
        reads.append(absolute(job.request.good))
    session.connect(job.request.address, reads=reads, writes=[job.run.location])
    session.warm_up_ray_data()
    return plan_actors(session.resources(), job.request.wishes, _weights(job.models))


def actor_settings(job: Job, opened: Opened, faults: Any) -> ActorSettings:
    """The settings of every actor of the job, whose `faults.Faults` these are."""
    request, actors = job.request, opened.actors
    return ActorSettings(
        models=job.models,
        storage=job.run.storage,
        seed=request.seed,
        maps=request.maps,
        reconstructions=request.reconstructions,
        gpu=actors.num_gpus,
        threads=actors.threads,
        slots=request.batch_size if actors.num_gpus else actors.slots,
        search=request.search,
        precision=request.precision,
        compiled=request.compiled,
        memory=opened.memory(job.run),
        run=opened.plan.run,
        faults=faults,
        alone=request.address is None,
    )


def _weights(models: Models) -> int:
    """Bytes of the weights that an actor holds at most: of the largest bundles that it keeps at a time."""
    sizes = [sum(entry.size for entry in description.files.values()) for description in models.descriptions.values()]
    return sum(sorted(sizes)[-KEPT_MODELS:])


def _list(job: Job, actors: ActorPlan, say: Callable[[str], None], listing: str) -> Plan:
    """List the archive into the manifest of that name, and have the good patches of the nearest method remembered."""
    request, run = job.request, job.run
    known, manifest = job.models.categories, run.path(MANIFEST, listing)
    listed = list_remotely(job.source, request.category, run.storage, manifest, bool(known), known)
    memory = memory_file(listing) if request.good is not None else None
    if memory is not None:
        say(f"{request.good}: {_remember(job, actors, run.path(memory))}")
    most_rows, shards = rows_and_shards(usual_pixels(job.models.settings().values()), actors)
    return draft(
        listed.rows, listing, memory, job.identity, most_rows, listed.duplicates, listed.blank, shards, listed.left_out
    )


def _list_new(job: Job, actors: ActorPlan, plan: Plan, listing: str) -> Plan:
    """List the images that no listing of the plan has into the manifest of that name."""
    run, known = job.run, job.models.categories
    earlier = [(run.path(MANIFEST, before.name), before.listed) for before in plan.listings]
    listed = list_remotely(
        job.source, job.request.category, run.storage, run.path(MANIFEST, listing), bool(known), known, earlier
    )
    if not sum(listed.rows):
        raise NothingNew(_nothing_new(plan, listed))
    most_rows, shards = rows_and_shards(usual_pixels(job.models.settings().values()), actors)
    grown = plan.grown(listed.rows, listing, most_rows, shards)
    return replace(grown, duplicates=listed.duplicates, blank=listed.blank, left_out=listed.left_out)


def _nothing_new(plan: Plan, listed: Listed) -> str:
    at = plan.listings[-1].at
    since = f" since {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" if at else ""
    notes = [f"{listed.left_out[reason]} {reason}" for reason in (CHANGED, BEING_WRITTEN) if reason in listed.left_out]
    gone = plan.images - listed.judged
    if gone:
        notes.append(f"{gone} of the run's {plan.images} no longer there")
    return "; ".join([f"no new pictures{since}", *notes])


def _remember(job: Job, actors: ActorPlan, file: str) -> str:
    """Have a task with an actor's resources build the memory of good patches; returns a line on its images."""
    import ray

    from pipelines.score.patch_memory import build_memory

    request, run = job.request, job.run
    assert request.good is not None
    task: Any = ray.remote(num_cpus=actors.num_cpus, num_gpus=actors.num_gpus)(build_memory)
    device = "cuda" if actors.num_gpus else "cpu"
    try:
        bundle, model_id = job.models.bundles[""], job.models.descriptions[""].model_id
        good = absolute(request.good)
        return str(ray.get(task.remote(good, bundle, model_id, run.storage, file, device, request.seed)))
    except ray.exceptions.RayError as error:
        raise session.root_cause(error, GladError, StorageError) from None
