"""`glad train`: train one part of a bundle on good images with Ray Train, calibrate it, leave a new bundle.

`run_training` is the job, top to bottom: survey the images, train, calibrate, deliver. It is a Ray task, so `glad
retrain` runs many of them side by side, and it goes on from its last checkpoint whoever was killed: a worker, a node,
or the command itself, given again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster import session
from cluster.quick_imports import quick_imports
from cluster.storage import Storage, StorageError, is_s3, join, local_path
from glad_core.bundle.glad_json import GLAD_JSON, read_description
from glad_core.errors import GladError
from glad_core.training.recipe import Part, Recipe
from pipelines.models.find import SMALL, local_bundle
from pipelines.train.good_images import DATA_CPUS, GoodImage, Survey, curated, good_images, load_textures, survey
from pipelines.train.side_by_side import follow, tell
from pipelines.train.spec import FATAL, IDENTITY, Deliver, Outcome, TrainJob, clear_work

LEAST_CPUS = 0.25  # of a worker
MAX_FAILURES = 8  # worker groups lost to killed processes and preempted nodes before a run gives up
# What `glad train --part` starts from where the UNet's recipe in the base bundle does not speak for the part.
PART_RECIPES: dict[str, dict[str, Any]] = {
    "dino": {"steps": 300, "batch_size": 8, "learning_rate": 1e-5, "weight_decay": 0.0},
    "vae": {"steps": 500, "batch_size": 8, "learning_rate": 1e-5, "weight_decay": 0.0},
}


@dataclass(frozen=True)
class TrainRequest:
    """What `glad train` was asked; locations are local or s3://. ``None`` in ``recipe``: what the base recommends."""

    dataset: str
    category: str | None
    base: str
    out: str
    recipe: dict[str, Any]
    part: Part = "unet"
    textures: str | None = None
    device: str | None = None
    workers: int = 1
    target_fpr: float = 0.05
    address: str | None = None
    exclude: str | None = None  # runs with feedback (`pipelines.runs.feedback`)
    include: str | None = None


def train(request: TrainRequest, console: Console) -> str:
    """Run the whole job and return the new bundle's model id.

    The folder ``OUT.train`` beside the new bundle holds checkpoints and metrics while the job runs; the metrics stay.

    Raises:
        GladError, StorageError, SessionError: a mistake in what was asked, one line, before any work.
    """
    storage = Storage.from_environment()
    out = request.out.rstrip("/") if is_s3(request.out) else local_path(request.out)
    found = good_images(request.dataset, request.category, storage)
    found, what = curated(found, request.exclude, request.include, storage)
    if what:
        console.print(what, highlight=False, soft_wrap=True)
    job = plan_job(request, list(found), storage, name=" ".join(found), work=f"{out}.train")
    if storage.kind(out) != "none":
        raise GladError(f"{out} already exists: choose another --out or remove it")
    claim_work(storage, job.work)
    session.connect(request.address)
    job = with_resources(job, request)
    deliver = partial(deliver_bundle, storage=storage, out=out)
    outcome = follow({job.name: partial(run_training, job, found, deliver)}, 1, console)[job.name]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome.model_id


def deliver_bundle(made: Path, job: TrainJob, seen: Survey, *, storage: Storage, out: str) -> Outcome:
    """The bundle to ``out``, its metrics beside it; checkpoints go."""
    if not storage.publish(made, out, GLAD_JSON):
        raise GladError(f"{out} already exists: choose another --out or remove it")
    clear_work(storage, job.work, out)
    return Outcome("trained", read_description(made).model_id)


def plan_job(request: TrainRequest, categories: list[str], storage: Storage, *, name: str, work: str) -> TrainJob:
    """The run as far as it is known before looking at the images; checks the base and the recipe."""
    base = local_bundle(request.base, storage)
    description = read_description(base)
    recommended = description.provenance.get("recipe", {}) if request.part == "unet" else PART_RECIPES[request.part]
    asked = {name: value for name, value in request.recipe.items() if value is not None}
    recipe = Recipe.parse(recommended | asked, f"training recipe of {request.base} with the options given")
    if recipe.batch_size % request.workers:
        raise GladError(
            f"--batch-size {recipe.batch_size} cannot be shared by {request.workers} workers: "
            f"use a multiple of {request.workers}"
        )
    if request.textures is not None:
        load_textures(request.textures, 8, storage, limit=1)
    if recipe.optimizer == "adamw8bit":
        from glad_core.training.loop import adamw_8bit

        adamw_8bit()
    base_uri = request.base if is_s3(request.base) or request.base == SMALL else str(base)
    return TrainJob(
        name=name,
        base=base_uri,
        part=request.part,
        recipe=recipe,
        categories=categories,
        images=[],
        textures=request.textures,
        target_fpr=request.target_fpr,
        work=work,
        storage=storage,
        workers=request.workers,
    )


def claim_work(storage: Storage, work: str) -> None:
    """The proof that the run's folder can be written, before any work."""
    try:
        storage.write(join(work, "written.txt"), b"a training run keeps its checkpoints and metrics here\n")
    except StorageError as error:
        raise StorageError(f"cannot write {work}: choose another --out ({error})") from error


def with_resources(job: TrainJob, request: TrainRequest, parallel: int = 1) -> TrainJob:
    """The job with its share of the connected cluster, ``parallel`` such jobs running at a time.

    A GPU per worker where there are any (or cuda is asked for); otherwise the CPUs are shared out (`cpu_share`).

    Raises:
        GladError: more than this machine has. A cluster at an address may grow, so there nothing is refused.
    """
    grows = request.address is not None
    gpus = session.gpus(session.resources())
    if request.device == "cuda" or (request.device is None and gpus):
        if job.workers > gpus and not grows:
            raise GladError(f"{job.workers} workers need as many GPUs, this machine has {gpus:g}: lower --workers")
        return replace(job, cpus=1.0, gpus=1.0, device="cuda")
    if request.device is not None:
        _check_device(request.device)
    share = cpu_share(session.node_cpus(), job.workers * parallel)
    if share < LEAST_CPUS and not grows:
        raise GladError(
            f"{job.workers * parallel} workers do not fit this machine's {sum(session.node_cpus()):g} CPUs: "
            "lower the number of workers"
        )
    return replace(job, cpus=max(share, LEAST_CPUS), device=request.device or "cpu")


def cpu_share(nodes: list[float], workers: int) -> float:
    """The most CPUs each of ``workers`` can have when none spans two nodes and every node keeps some for the data."""
    free = [cpus - DATA_CPUS for cpus in nodes if cpus > DATA_CPUS]
    # What is shared out evenly on some node is the only kind of answer there can be.
    shares = sorted({node / count for node in free for count in range(1, workers + 1)}, reverse=True)
    for share in shares:
        # Rounded down, so that the shares of a node never add up to more than it has.
        rounded = math.floor(share * 100) / 100
        if rounded and sum(int(node / rounded + 1e-9) for node in free) >= workers:
            return rounded
    return 0.0


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GladError(f"--device {device} cannot be used on this machine; try cpu") from error


Prepare = Callable[[TrainJob, Survey], TrainJob | Outcome]


def run_training(
    job: TrainJob,
    found: dict[str, list[GoodImage]],
    deliver: Deliver,
    events: Any,
    prepare: Prepare | None = None,
) -> Outcome:
    """One training job from images to a delivered bundle. Runs as a Ray task.

    Args:
        found: good images by category.
        deliver: see `pipelines.train.finish`.
        events: queue of what the user is to see.
        prepare: called with what the survey found; says where to work, or what came of the very same run earlier.
    """
    import ray

    session.configure_ray_data()
    say = partial(tell, events, job.name, "survey")
    say()
    description = read_description(local_bundle(job.base, job.storage))
    seen = survey(found, description.settings["resolution"], job.storage)
    for uri, reason in seen.skipped:
        say(warning=f"{uri}: {reason}; skipped")
    if len(seen.sizes) > 1:
        say(warning=f"images of {len(seen.sizes)} sizes ({', '.join(seen.sizes[:3])}, …), all made square")
    job = replace(job, images=seen.fit)
    if prepare is not None:
        prepared = prepare(job, seen)
        if isinstance(prepared, Outcome):
            return prepared
        job = prepared
    _check_identity(job, seen)
    checkpoint = _fit(job, events)
    finishing = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus)(_finish)
    return ray.get(finishing.remote(job, seen, checkpoint, deliver, events))


def _check_identity(job: TrainJob, seen: Survey) -> None:
    """Refuse the folder of a different run; a marker of an earlier failure goes, this is a new attempt."""
    identity = job.identity(seen)
    place = join(job.work, IDENTITY)
    if job.storage.kind(place) == "file":
        earlier = json.loads(job.storage.read(place))
        changed = [key for key in identity if earlier.get(key) != identity[key]]
        if changed:
            raise GladError(
                f"{job.work} holds another run (different {', '.join(changed)}): remove it or choose another --out"
            )
    job.storage.write(place, json.dumps(identity, indent=1).encode())
    job.storage.delete_file(join(job.work, FATAL))


def _fit(job: TrainJob, events: Any) -> Any:
    """Ray Train over ``job.workers``; returns the last checkpoint. The same run goes on where it was."""
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer

    filesystem, path = job.storage.resolve(job.work)
    folder, _, name = path.rpartition("/")
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "events": events},
        scaling_config=ray_train.ScalingConfig(
            num_workers=job.workers,
            use_gpu=job.gpus > 0,
            resources_per_worker={"CPU": job.cpus} | ({"GPU": job.gpus} if job.gpus else {}),
        ),
        run_config=ray_train.RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=ray_train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        reason = _fatal(job) or " ".join(str(error).split())[:300]
        raise GladError(f"{job.name}: training failed: {reason}") from error
    fatal = _fatal(job)
    if fatal is not None:
        raise GladError(f"{job.name}: {fatal}")
    if result.checkpoint is None:
        raise GladError(f"{job.name}: training left no checkpoint in {job.work}; give the same command again")
    return result.checkpoint


# Functions of this light module: Ray's controller and the waiting task take them in as well, and would import for
# seconds what only the worker needs.


def _work(config: dict[str, Any]) -> None:
    with quick_imports("transformers", "peft"):
        from pipelines.train.worker import train_worker
    train_worker(config)


def _finish(*arguments: Any) -> Outcome:
    with quick_imports("transformers", "peft"):
        from pipelines.train.finish import finish
    return finish(*arguments)


def _fatal(job: TrainJob) -> str | None:
    place = join(job.work, FATAL)
    return job.storage.read(place).decode() if job.storage.kind(place) == "file" else None
