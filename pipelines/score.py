"""`glad score`: an archive of photos in, verdicts in Parquet out; `dataflow` is the job, top to bottom."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import session
from cluster.storage import Storage, StorageError, is_s3, join, local_path
from glad_core.errors import GladError
from glad_core.search import Search, search_of
from pipelines import results, shards, sources
from pipelines.actor_plan import ActorPlan, plan_actors
from pipelines.decode import fetch_and_decode
from pipelines.glad_actor import KEPT_MODELS, ActorSettings, GladActor
from pipelines.listing import PART_ROWS, TASK_CPUS, list_remotely, read_manifest
from pipelines.model_source import SMALL, Models, find_models
from pipelines.progress import Progress
from pipelines.shards import Plan, Written

if TYPE_CHECKING:
    from ray.data import Dataset

SHARDS_PER_TASK = 8  # decoded by one task, up to `IMAGES_PER_TASK` images
IMAGES_PER_TASK = 128
MAX_TASKS = 10_000  # that decode; in a huge archive each does several stretches
MAX_ROWS_PER_BLOCK = 64
LEAST_ROOM = 64 * 2**20  # bytes of Ray's object store for one job
CALLS = 8  # batches at work in an actor at a time
WRITERS = 2  # no more than there are GLAD actors
COUNTED = ("scored", "anomalies", "errors")


class TooManyErrors(Exception):
    """More images failed than --max-errors allows; the command ends with exit code 1."""


@dataclass(frozen=True)
class ScoreRequest:
    """What the user asked for; None where the machine decides. ``num_cpus`` and ``num_gpus`` are per actor.

    ``good`` holds the images that ``nearest`` remembers.
    """

    source: str
    out: str
    model: str = SMALL
    category: str | None = None
    batch_size: int | None = None
    actors: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    seed: int = 0
    max_errors: int | None = None
    maps: Literal["token", "full"] = "token"
    reconstructions: bool = False
    address: str | None = None
    overwrite: bool = False
    method: Literal["glad", "nearest"] = "glad"
    good: str | None = None
    search: Search | None = None
    precision: Literal["off", "bf16", "fp16"] = "off"
    compiled: bool = False


@dataclass(frozen=True)
class Counts:
    """``images`` in the manifest = ``scored`` + ``errors``; ``anomalies`` of those scored, None without a threshold."""

    images: int
    scored: int
    anomalies: int | None
    errors: int
    duplicates: int


def score(request: ScoreRequest, console: Console) -> Counts:
    """Run the job: check everything that needs no model, list the archive, score it, close the run.

    A run that was cut off goes on where its commits end; one that is complete is only told.

    Raises:
        GladError, StorageError, SessionError: a mistake in what was asked, one line.
        TooManyErrors: as ``max_errors`` demands; what was written stays, without run.json.
    """
    started = datetime.now(UTC)
    storage = Storage.from_environment()
    out, source = _absolute(request.out), _absolute(request.source)
    if source == out or out.startswith(source.rstrip("/") + "/"):
        raise GladError(f"{out} lies inside the archive {source}: choose an --out outside of it")
    models = find_models(request.model, storage)
    searches = {key: search_of(settings, request.search) for key, settings in models.settings().items()}
    if (request.method == "nearest") != (request.good is not None):
        raise GladError(
            "--method nearest needs good images to remember: --good FOLDER (and only that method takes them)"
        )
    if request.method == "nearest" and "" not in models.bundles:
        raise GladError(f"{request.model} is a registry: --method nearest takes one bundle, for its features")
    if storage.kind(source) == "none" and not sources.WILDCARDS.search(source):
        raise GladError(f"{source}: no such file or folder; name a folder, a glob, a list of URIs or tar shards")

    state = shards.claim(out, storage, _asked(request, source, models, searches), request.overwrite)
    if state == "complete":
        console.print("this run is complete; for images that have come since, choose another --out", highlight=False)
        run = results.read_run(out, storage)
        counts = Counts(**run["counts"])
        _closing_table(console, counts, run["seconds"], out)
        return counts
    storage = storage.patient()
    plan = shards.read_plan(out, storage)
    try:
        session.connect(request.address)
        session.warm_up_ray_data()
        sizes = [sum(entry.size for entry in manifest.files.values()) for manifest in models.manifests.values()]
        room = plan_actors(session.resources(), request, sum(sorted(sizes)[-KEPT_MODELS:]))
        if plan is None:
            storage.delete_folder(join(out, results.MANIFEST))  # of a listing that was cut off
            listed = list_remotely(
                source, request.category, storage, join(out, results.MANIFEST), bool(models.categories)
            )
            plan = shards.make_plan(listed.rows, listed.duplicates, out, storage, PART_ROWS)
        memory = _remember(request, models, storage, out, room) if request.good is not None else None
    except BaseException:
        if state == "new":
            shards.release(out, storage)  # nothing was scored: leave DEST free for the corrected command
        raise
    commits = shards.read_commits(out, storage)
    console.print(f"{plan.images} images in {escape(source)}; {room.describe()}", highlight=False)
    if request.address is not None and request.num_gpus is None and not room.num_gpus:
        console.print("this cluster has no GPU, so its CPUs compute: --num-gpus 1 waits for GPUs", highlight=False)

    actor = ActorSettings(
        models=models,
        storage=storage,
        seed=request.seed,
        maps=request.maps,
        reconstructions=request.reconstructions,
        gpu=room.num_gpus > 0,
        threads=room.threads,
        slots=room.slots,
        search=request.search,
        precision=request.precision,
        compiled=request.compiled,
        memory=memory,
        run=plan.run,
    )
    log = logging.LoggerAdapter(logging.getLogger("glad.score"), {"run": plan.run})
    log.info("%d of %d shards of %s are missing", plan.shards - len(commits), plan.shards, out)
    scored, anomalies, errors = (sum(getattr(of, name) for of in commits.values()) for name in COUNTED)
    if commits:
        console.print(f"going on after {scored + errors} images", highlight=False)
    clock = time.monotonic()
    waiting_for = partial(session.waiting_for, room.num_cpus, room.num_gpus)
    with (
        Progress(console, plan.images, scored + errors, waiting_for) as progress,
        closing(run_dataflow(storage, out, actor, room, plan, set(commits), request.address is None)) as written,
    ):
        for piece, commit in shards.commit(written, plan, out, storage):
            scored, anomalies, errors = scored + piece.scored, anomalies + piece.anomalies, errors + piece.errors
            progress.update(scored + errors, anomalies, errors)
            if commit is not None:
                commits[commit.shard] = commit
                log.info("shard %d committed: %d scored, %d errors", commit.shard, commit.scored, commit.errors)
            if request.max_errors is not None and errors > request.max_errors:
                raise TooManyErrors(
                    f"stopped after {errors} errors, more than --max-errors {request.max_errors}; "
                    f"see {join(out, results.ERRORS)}"
                )
    seconds = time.monotonic() - clock
    if len(commits) != plan.shards:
        raise GladError(
            f"{out}: {plan.shards - len(commits)} of {plan.shards} shards are missing; run the command again"
        )
    shards.sweep(commits.values(), out, storage)
    scored, anomalies, errors = (sum(getattr(of, name) for of in commits.values()) for name in COUNTED)

    calibrated = memory is None and any(settings.threshold is not None for settings in models.settings().values())
    if memory is not None:
        from pipelines.memory import read_memory

        calibrated = read_memory(memory, storage).threshold is not None
    found = anomalies if calibrated else None
    counts = Counts(plan.images, scored, found, errors, plan.duplicates)
    record = _run_record(request, source, out, models, searches, room, counts, started, seconds)
    results.complete(out, storage, record | {"run": plan.run})
    log.info("complete: %d scored, %d errors", counts.scored, counts.errors)
    _closing_table(console, counts, seconds, out)
    return counts


def run_dataflow(
    storage: Storage, out: str, actor: ActorSettings, room: ActorPlan, plan: Plan, done: set[int], alone: bool
) -> Generator[Written]:
    """What the job writes, piece by piece; closing it, or an exception, ends the actors.

    Raises:
        GladError, StorageError: in any of its processes.
    """
    if len(done) == plan.shards:
        return
    failure: BaseException | None = None
    try:
        # The dataset has no name here: who knows it knows its actors.
        rows: Any = iter(dataflow(storage, out, actor, room, plan, done, alone).iter_rows())
        with closing(rows):
            for row in rows:
                yield Written(**row | {"files": tuple(row["files"])})
    except Exception as error:
        failure = session.root_cause(error, GladError, StorageError)
    if failure is not None:
        # Ray ends actors and frees their CPUs once nothing refers to them any more, and its exceptions do, in cycles.
        gc.collect()
        raise failure


def dataflow(
    storage: Storage, out: str, actor: ActorSettings, room: ActorPlan, plan: Plan, done: set[int], alone: bool
) -> Dataset:
    """The job as one Ray Data chain: manifest -> fetch + decode -> GLAD -> results and errors.

    Shards ``done`` are left out before anything of them is fetched. Only a row for each shard written reaches the
    driver, so its memory hardly grows with the archive. The job has Ray ``alone`` where no address was given.
    """
    import ray.data

    sides = {key: settings.resolution for key, settings in actor.models.settings().items()}
    largest = max(sides.values())
    per_task = min(IMAGES_PER_TASK, SHARDS_PER_TASK * plan.rows_per_shard)
    stretches = [
        (start, min(start + per_task, end))
        for first, end in plan.stretches(done, PART_ROWS)
        for start in range(first, end, per_task)
    ]
    decode = fetch_and_decode(storage, lambda category: sides.get(actor.models.key(category) or "", largest))

    def list_and_decode(stretch: pa.Table) -> Iterator[pa.Table]:
        for place in stretch.to_pylist():
            images = read_manifest(join(out, results.MANIFEST), plan.listed, place["first"], place["last"], storage)
            for start in range(0, len(images), share):
                yield decode(images.slice(start, share))

    rows = ray.data.from_items(
        [{"first": first, "last": last} for first, last in stretches],
        override_num_blocks=min(len(stretches), MAX_TASKS),
    )
    # In the manifest's order, so that a shard's images come together and are written together.
    rows.context.execution_options.preserve_order = True
    # No more actors than batches.
    left = (plan.shards - len(done)) * plan.rows_per_shard
    first = min(room.actors, -(-left // room.slots))
    actors: dict[str, Any] = {"min_size": 1, "initial_size": first} if room.grows else {"size": first}
    # A block is a call, and leaves as soon as it is full: one batch of pixels, so that actors start at once and results
    # arrive steadily, or less, so that the actor that is ready first does not take all of a small archive; some batches
    # in a large one, since every block costs Ray a task. (`repartition` would say it better, but its task wants a whole
    # CPU that the actors have.)
    share = min(room.slots, -(-left // (first * (2 * CALLS if room.grows else CALLS))))
    rows_per_block = max(share, min(MAX_ROWS_PER_BLOCK, plan.images // 400))
    rows.context.target_max_block_size = rows_per_block * largest * largest * 3
    calls = max(2, CALLS * share // rows_per_block)
    # A pool grows while every actor has all the calls in flight that it may: twice as many as run, so that images
    # waiting for an actor count as a backlog.
    in_flight = 2 * calls if room.grows else calls
    if alone and room.decoders is not None:
        ahead = room.decoders * per_task * -(-len(stretches) // MAX_TASKS) + 2 * first * in_flight * rows_per_block
        rows.context.execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=_room(actor, plan, largest, ahead)
        )
    decoded = rows.map_batches(
        list_and_decode,
        batch_size=1,
        batch_format="pyarrow",
        # On one machine their number is planned and they ask for none: of what actors leave Ray Data counts whole CPUs,
        # and on two cores it would decode one at a time. In a cluster that would place them on a head without CPUs.
        num_cpus=0 if alone else TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=room.decoders),
    )
    judged = decoded.map_batches(
        GladActor,
        fn_constructor_args=(actor,),
        # Several calls in an actor at a time, so that its engine always has an image for a free slot.
        compute=ray.data.ActorPoolStrategy(
            **actors, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=in_flight
        ),
        batch_size=share,
        batch_format="pyarrow",
        num_cpus=room.num_cpus,
        num_gpus=room.num_gpus,
    )
    return judged.map_batches(
        results.ResultsWriter,
        fn_constructor_args=(storage, out, plan.rows_per_shard, uuid4().hex[:8]),
        batch_size=plan.rows_per_shard,
        batch_format="pyarrow",
        # Actors, because Ray may end the process of a task soon after it, and each new one takes seconds of a core.
        compute=ray.data.ActorPoolStrategy(size=WRITERS if room.grows else min(WRITERS, first)),
        # Decoding tasks hold their CPUs to their end, and a write that waited for them would hold up the commits.
        num_cpus=0,
    )


def _room(actor: ActorSettings, plan: Plan, side: int, ahead: int) -> float:
    """Bytes of Ray's object store that a job may take, of which each of its three stages gets about a third.

    Enough for ``ahead`` decoded images, and for what actors have made of two shards more than writers work on. Without
    a limit decoding runs on while actors start, slows them, and fills the store with gigabytes that nobody waits for.
    """
    pixels = side * side
    made = pixels * ((2 if actor.maps == "full" else 1 / 32) + (3 if actor.reconstructions else 0)) + 4096
    return max(LEAST_ROOM, 3 * ahead * pixels * 3, 3 * (WRITERS + 2) * plan.rows_per_shard * made)


def _remember(request: ScoreRequest, models: Models, storage: Storage, out: str, room: ActorPlan) -> str:
    """The memory of good patches, made by a task with an actor's resources; returns where it is."""
    import ray

    from pipelines.memory import build_memory

    assert request.good is not None
    place = join(out, results.MEMORY)
    if storage.kind(place) == "file":  # of an attempt that was cut off
        return place
    device = "cuda" if room.num_gpus else "cpu"
    task: Any = ray.remote(num_cpus=room.num_cpus, num_gpus=room.num_gpus)(build_memory)
    try:
        ray.get(task.remote(_absolute(request.good), models.bundles[""], storage, place, device, request.seed))
    except ray.exceptions.RayError as error:
        raise session.root_cause(error, GladError, StorageError) from None
    return place


def _absolute(location: str) -> str:
    return location.rstrip("/") if is_s3(location) else local_path(location)


def _asked(request: ScoreRequest, source: str, models: Models, searches: dict[str, Search]) -> dict[str, Any]:
    """Everything that decides the results: another command may only go on with a run if it asks the same."""
    fixed = ("category", "method", "good", "seed", "maps", "reconstructions", "precision", "compiled")
    return {
        "source": source,
        "models": {key: manifest.model_id for key, manifest in models.manifests.items()},
        "search": searches,
    } | {name: getattr(request, name) for name in fixed}


def _run_record(
    request: ScoreRequest,
    source: str,
    out: str,
    models: Models,
    searches: dict[str, Search],
    room: ActorPlan,
    counts: Counts,
    started: datetime,
    seconds: float,
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "source": source,
        "out": out,
        "model": request.model,
        # By category; the key "" is the one bundle for all images.
        "models": {
            key: {"model_id": manifest.model_id, "category": manifest.category, "settings": manifest.settings}
            | {"search": searches[key] if request.method == "glad" else None}
            | {"calibration": _calibration(manifest.provenance) if request.method == "glad" else None}
            for key, manifest in models.manifests.items()
        },
        "method": request.method,
        "request": {"seed": request.seed, "batch_size": room.slots, "maps": request.maps}
        | {"reconstructions": request.reconstructions, "category": request.category, "max_errors": request.max_errors}
        | {"precision": request.precision, "compiled": request.compiled},
        "actors": asdict(room),
        "counts": asdict(counts),
        "versions": {name: version(name) for name in ("glad-ray", "ray", "torch", "diffusers", "timm", "pyarrow")},
        "host": os.uname().nodename,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def _calibration(provenance: dict[str, Any]) -> dict[str, Any] | None:
    """On how many good images the threshold was set for which false-positive rate; None where the bundle is silent."""
    images = provenance.get("calibration_images", provenance.get("held_out_images"))
    if images is None or "target_fpr" not in provenance:
        return None
    return {"images": images, "target_fpr": provenance["target_fpr"]}


def _closing_table(console: Console, counts: Counts, seconds: float, out: str) -> None:
    table = Table(show_header=False)
    table.add_row("images", str(counts.images))
    anomalies = "-" if counts.anomalies is None else str(counts.anomalies)
    table.add_row("anomalies", anomalies + (" (the bundle has no threshold)" if counts.anomalies is None else ""))
    table.add_row("errors", str(counts.errors) + (f" (see {join(out, results.ERRORS)})" if counts.errors else ""))
    if counts.duplicates:
        table.add_row("listed twice", f"{counts.duplicates} (scored once)")
    table.add_row("images/s", f"{counts.images / max(seconds, 1e-9):.2f}")
    table.add_row("results", escape(join(out, results.RESULTS)))
    console.print(table, highlight=False)
