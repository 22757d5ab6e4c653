"""`glad retrain`: train, calibrate and check many categories side by side; the better models go live in a registry.

Every category is one `train.run_training` task, so one's failure does not touch the others, and the same command again
does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import session
from cluster.storage import Storage, join
from glad_core import bundle, calibration
from pipelines import registry, train, training_data
from pipelines.model_source import local_bundle
from pipelines.train import TrainRequest

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
    home = registry.absolute(request.train.out)
    found = training_data.good_images(request.train.dataset, request.train.category or "all", storage)
    jobs = {name: train.plan_job(request.train, [name], storage, name=name, work="") for name in found}
    train.claim_work(storage, join(home, WORK))
    session.connect(request.train.address)
    parallel = parallel_jobs(request, session.resources(), len(jobs))
    tasks = {}
    for name, job in jobs.items():
        sized = train.with_resources(
            job,
            request.train.device,
            session.resources(),
            parallel,
            grows=request.train.address is not None,
        )
        deliver = partial(
            publish_and_promote, storage=storage, home=home, promote=request.promote, margin=request.margin
        )
        prepare = partial(look_up, storage=storage, home=home)
        tasks[name] = partial(
            train.run_training, sized, {name: found[name]}, request.train.target_fpr, deliver, prepare=prepare
        )
    console.print(f"{len(tasks)} categories, {parallel} at a time", highlight=False)
    outcomes = train.follow(tasks, parallel, console)
    table = Table("category", "outcome", "version")
    for name, outcome in outcomes.items():
        if isinstance(outcome, BaseException):
            table.add_row(name, f"[red]failed: {escape(' '.join(str(outcome).split())[:400])}[/red]", "-")
        else:
            facts = json.loads(outcome)
            table.add_row(name, escape(facts["outcome"]), facts["version"])
    console.print(table)
    return not any(isinstance(outcome, BaseException) for outcome in outcomes.values())


def parallel_jobs(request: RetrainRequest, available: dict[str, float], jobs: int) -> int:
    """How many categories at a time: what was asked, but never more than fit, or all would wait for each other."""
    workers = request.train.workers
    gpus = available.get("GPU", 0.0)
    if request.train.device == "cuda" or (request.train.device is None and gpus):
        fitting = int(gpus // workers)
    else:
        fitting = int((available.get("CPU", 1.0) - training_data.DATA_CPUS) / (0.5 * workers))
    return max(1, min(jobs, fitting, request.max_parallel or jobs))


def look_up(job: train.TrainJob, seen: training_data.Survey, *, storage: Storage, home: str) -> train.TrainJob | str:
    """The outcome of an earlier run that trained the same on the same images, if there is one; else where to work."""
    wanted = run_id(job, seen)
    for version in registry.versions(home, job.name, storage):
        if registry.manifest(home, job.name, version, storage).provenance.get("run") == wanted:
            return json.dumps({"outcome": "up to date", "version": version})
    return replace(job, work=join(home, WORK, job.name, wanted))


def run_id(job: train.TrainJob, seen: training_data.Survey) -> str:
    """What makes two training runs the same."""
    base = bundle.read_manifest(local_bundle(job.base, job.storage)).model_id
    facts = [base, job.part, job.recipe.model_dump(), seen.fingerprint, job.textures]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def publish_and_promote(
    made: Path, facts: dict[str, Any], *, storage: Storage, home: str, promote: str, margin: float
) -> str:
    """Add the bundle to the registry and, if it may, make it current; returns ``{"outcome", "version"}`` as JSON."""
    job, seen = facts["job"], facts["seen"]
    manifest = bundle.read_manifest(made)
    settings = bundle.Settings.parse(manifest.settings, str(made))
    bundle.update_settings(made, settings, {"run": run_id(job, seen)})
    version = registry.publish(made, home, job.name, storage)
    before = registry.current(home, job.name, storage)
    outcome = "trained, not promoted"
    if promote == "always" or (promote == "gate" and before is None):
        registry.promote(home, job.name, version, storage, "first version" if before is None else "always")
        outcome = "promoted"
    elif promote == "gate" and before is not None:
        verdict = _gate(made, join(home, job.name, before.version), facts, storage, margin)
        outcome = f"kept {before.version}: {verdict.describe()}"
        if verdict.passed:
            registry.promote(home, job.name, version, storage, verdict.describe())
            outcome = f"promoted: {verdict.describe()}"
    train.clear_work(storage, job.work, join(home, job.name, f"{version}.training.parquet"))
    storage.delete_folder(join(home, WORK, job.name))  # runs on other images that never ended
    return json.dumps({"outcome": outcome, "version": version})


def _gate(made: Path, before: str, facts: dict[str, Any], storage: Storage, margin: float) -> calibration.Comparison:
    """New against current on the same held-out good images and synthetic anomalies."""
    job, seen, device = facts["job"], facts["seen"], facts["device"]
    models = [bundle.load_bundle(made, device), bundle.load_bundle(local_bundle(before, storage), device)]
    sides = [model.settings.resolution for model in models]
    good = [training_data.read_pixels(seen.held_out, side, storage) for side in sides]
    return calibration.compare(models[0], models[1], good[0], good[1], job.recipe.foreground_mode, margin)
