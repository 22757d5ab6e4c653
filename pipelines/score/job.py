"""`glad score`: an archive of photos in, verdicts in Parquet out; `dataflow` is what runs on the cluster."""

from __future__ import annotations

import logging
import os
import time
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import session
from cluster.storage import Storage, StorageError, is_s3, join, local_path
from glad_core.bundle.glad_json import versions
from glad_core.engine.search import Search, search_of
from glad_core.errors import GladError
from pipelines.archive import sources
from pipelines.archive.listing import PART_ROWS, list_remotely
from pipelines.models.find import Models, find_models
from pipelines.runs.commits import claim, make_plan, read_commits, read_plan, release, sweep
from pipelines.runs.commits import commit as commit_shards
from pipelines.runs.schema import ERRORS, MANIFEST, MEMORY, RESULTS, read_run
from pipelines.runs.write import complete
from pipelines.score.actor import KEPT_MODELS, ActorSettings
from pipelines.score.actor_plan import ActorPlan, plan_actors
from pipelines.score.dataflow import run_dataflow
from pipelines.score.progress import Progress
from pipelines.score.request import Counts, ScoreRequest, TooManyErrors

COUNTED = ("scored", "anomalies", "errors")


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

    state = claim(out, storage, _asked(request, source, models, searches), request.overwrite)
    if state == "complete":
        console.print("this run is complete; for images that have come since, choose another --out", highlight=False)
        run = read_run(out, storage)
        counts = Counts(**run["counts"])
        _closing_table(console, counts, run["seconds"], out)
        return counts
    storage = storage.patient()
    plan = read_plan(out, storage)
    try:
        session.connect(request.address)
        session.warm_up_ray_data()
        sizes = [sum(entry.size for entry in manifest.files.values()) for manifest in models.manifests.values()]
        room = plan_actors(session.resources(), request.wishes, sum(sorted(sizes)[-KEPT_MODELS:]))
        if plan is None:
            storage.delete_folder(join(out, MANIFEST))  # of a listing that was cut off
            listed = list_remotely(source, request.category, storage, join(out, MANIFEST), bool(models.categories))
            plan = make_plan(listed.rows, listed.duplicates, out, storage, PART_ROWS)
        memory = _remember(request, models, storage, out, room) if request.good is not None else None
    except BaseException:
        if state == "new":
            release(out, storage)  # nothing was scored: leave DEST free for the corrected command
        raise
    commits = read_commits(out, storage)
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
        for piece, commit in commit_shards(written, plan, out, storage):
            scored, anomalies, errors = scored + piece.scored, anomalies + piece.anomalies, errors + piece.errors
            progress.update(scored + errors, anomalies, errors)
            if commit is not None:
                commits[commit.shard] = commit
                log.info("shard %d committed: %d scored, %d errors", commit.shard, commit.scored, commit.errors)
            if request.max_errors is not None and errors > request.max_errors:
                raise TooManyErrors(
                    f"stopped after {errors} errors, more than --max-errors {request.max_errors}; "
                    f"see {join(out, ERRORS)}"
                )
    seconds = time.monotonic() - clock
    if len(commits) != plan.shards:
        raise GladError(
            f"{out}: {plan.shards - len(commits)} of {plan.shards} shards are missing; run the command again"
        )
    sweep(commits.values(), out, storage)
    scored, anomalies, errors = (sum(getattr(of, name) for of in commits.values()) for name in COUNTED)

    calibrated = memory is None and any(settings.threshold is not None for settings in models.settings().values())
    if memory is not None:
        from pipelines.score.patch_memory import read_memory

        calibrated = read_memory(memory, storage).threshold is not None
    found = anomalies if calibrated else None
    counts = Counts(plan.images, scored, found, errors, plan.duplicates)
    record = _run_record(request, source, out, models, searches, room, counts, started, seconds)
    complete(out, storage, record | {"run": plan.run})
    log.info("complete: %d scored, %d errors", counts.scored, counts.errors)
    _closing_table(console, counts, seconds, out)
    return counts


def _remember(request: ScoreRequest, models: Models, storage: Storage, out: str, room: ActorPlan) -> str:
    """The memory of good patches, made by a task with an actor's resources; returns where it is."""
    import ray

    from pipelines.score.patch_memory import build_memory

    assert request.good is not None
    place = join(out, MEMORY)
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
        "versions": versions("glad-ray", "ray", "torch", "diffusers", "timm", "pyarrow"),
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
    table.add_row("errors", str(counts.errors) + (f" (see {join(out, ERRORS)})" if counts.errors else ""))
    if counts.duplicates:
        table.add_row("listed twice", f"{counts.duplicates} (scored once)")
    table.add_row("images/s", f"{counts.images / max(seconds, 1e-9):.2f}")
    table.add_row("results", escape(join(out, RESULTS)))
    console.print(table, highlight=False)
