"""`glad train`: train one part of a bundle on good images with Ray Train, calibrate it, write a new bundle.

`run_training` is the job, top to bottom: survey the images, train, calibrate, deliver. It is a Ray task, so that `glad
retrain` can run many of them side by side. It resumes from its last checkpoint, whatever was killed: a worker, a node,
or the command, which the user then gives again.
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
from cluster.storage import Storage, StorageError, absolute, is_s3, join
from glad_core.bundle.glad_json import GLAD_JSON, read_description
from glad_core.errors import GladError
from glad_core.training.recipe import Part, Recipe
from pipelines.models.find import SMALL, local_bundle
from pipelines.train.good_images import GoodImage, apply_feedback, good_images
from pipelines.train.pixels import load_textures
from pipelines.train.side_by_side import run_side_by_side, send_event
from pipelines.train.spec import FATAL, IDENTITY, Deliver, Outcome, TrainJob, clear_work
from pipelines.train.survey import DATA_CPUS, Survey, survey

LEAST_CPUS = 0.25  # of a worker
MAX_FAILURES = 8  # worker groups lost to killed processes and preempted nodes before a run gives up
# The recipes of `glad train --part dino` and `--part vae`; the UNet's is in the base bundle.
PART_RECIPES: dict[str, dict[str, Any]] = {
    "dino": {"steps": 300, "batch_size": 8, "learning_rate": 1e-5, "weight_decay": 0.0},
    "vae": {"steps": 500, "batch_size": 8, "learning_rate": 1e-5, "weight_decay": 0.0},
}


@dataclass(frozen=True)
class TrainRequest:
    """The options of `glad train`; locations are local or s3://. None in ``recipe`` takes the base bundle's value."""

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
        GladError, StorageError, SessionError: a mistake in the request, one line, before any work.
    """
    storage = Storage.from_environment()
    out = absolute(request.out)
    images = good_images(request.dataset, request.category, storage)
    images, changes = apply_feedback(images, request.exclude, request.include, storage)
    if changes:
        console.print(changes, highlight=False, soft_wrap=True)
    job = plan_job(request, list(images), storage, name=" ".join(images), work=f"{out}.train")
    if storage.kind(out) != "none":
        raise GladError(f"{out} already exists: choose another --out or remove it")
    claim_work(storage, job.work)
    session.connect(request.address)
    job = with_resources(job, request)
    deliver = partial(deliver_bundle, storage=storage, out=out)
    outcome = run_side_by_side({job.name: partial(run_training, job, images, deliver)}, 1, console)[job.name]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome.model_id


def deliver_bundle(bundle: Path, job: TrainJob, surveyed: Survey, *, storage: Storage, out: str) -> Outcome:
    """Copy the bundle to ``out`` and its metrics beside it, and delete the checkpoints."""
    if not storage.publish(bundle, out, GLAD_JSON):
        raise GladError(f"{out} already exists: choose another --out or remove it")
    clear_work(storage, job.work, out)
    return Outcome("trained", read_description(bundle).model_id)


def plan_job(request: TrainRequest, categories: list[str], storage: Storage, *, name: str, work: str) -> TrainJob:
    """The job as far as it is known before the survey of its images; checks the base and the recipe."""
    base = local_bundle(request.base, storage)
    description = read_description(base)
    recommended = description.provenance.get("recipe", {}) if request.part == "unet" else PART_RECIPES[request.part]
    options = {name: value for name, value in request.recipe.items() if value is not None}
    recipe = Recipe.parse(recommended | options, f"training recipe of {request.base} with the options given")
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
    """Prove that the run's folder can be written, before any work."""
    try:
        storage.write(join(work, "written.txt"), b"a training run keeps its checkpoints and metrics here\n")
    except StorageError as error:
        raise StorageError(f"cannot write {work}: choose another --out ({error})") from error


def with_resources(job: TrainJob, request: TrainRequest, parallel: int = 1) -> TrainJob:
    """The job with its share of the connected cluster, if ``parallel`` such jobs run at a time.

    One GPU per worker if there are GPUs or the request is for cuda; otherwise a share of the CPUs (`cpu_share`).

    Raises:
        GladError: more than this machine has. A cluster may grow, so nothing is refused there.
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
    """Largest equal CPU share per worker, with no worker across nodes and `DATA_CPUS` reserved on each node; else 0."""
    free = [cpus - DATA_CPUS for cpus in nodes if cpus > DATA_CPUS]
    # The largest share divides some node's CPUs evenly: with any other, every node could give a little more.
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
    images: dict[str, list[GoodImage]],
    deliver: Deliver,
    events: Any,
    prepare: Prepare | None = None,
) -> Outcome:
    """One training job from images to a delivered bundle. Runs as a Ray task.

    Args:
        images: good images by category.
        deliver: brings the finished bundle where it belongs.
        events: queue of what the user sees (`side_by_side`).
        prepare: called after the survey; returns the job with its folder, or the outcome of an earlier, identical run.
    """
    import ray

    session.configure_ray_data()
    surveyed = _survey(job, images, events)
    job = replace(job, images=surveyed.fit)
    if prepare is not None:
        prepared = prepare(job, surveyed)
        if isinstance(prepared, Outcome):
            return prepared
        job = prepared
    _check_identity(job, surveyed)
    checkpoint = _fit(job, events)
    finishing = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus)(_finish)
    return ray.get(finishing.remote(job, surveyed, checkpoint, deliver, events))


def _survey(job: TrainJob, images: dict[str, list[GoodImage]], events: Any) -> Survey:
    send = partial(send_event, events, job.name, "survey")
    send()
    description = read_description(local_bundle(job.base, job.storage))
    surveyed = survey(images, description.settings["resolution"], job.storage)
    for uri, reason in surveyed.skipped:
        send(warning=f"{uri}: {reason}; skipped")
    if len(surveyed.sizes) > 1:
        send(warning=f"images of {len(surveyed.sizes)} sizes ({', '.join(surveyed.sizes[:3])}, …), all made square")
    return surveyed


def _check_identity(job: TrainJob, surveyed: Survey) -> None:
    """Refuse the folder of a different run; delete the mark of an earlier failure, since this is a new attempt."""
    identity = job.identity(surveyed)
    file = join(job.work, IDENTITY)
    if job.storage.kind(file) == "file":
        earlier = json.loads(job.storage.read(file))
        changed = [key for key in identity if earlier.get(key) != identity[key]]
        if changed:
            raise GladError(
                f"{job.work} holds another run (different {', '.join(changed)}): remove it or choose another --out"
            )
    job.storage.write(file, json.dumps(identity, indent=1).encode())
    job.storage.delete_file(join(job.work, FATAL))


def _fit(job: TrainJob, events: Any) -> Any:
    """Run Ray Train with ``job.workers``, resuming if there is a checkpoint; returns the last checkpoint."""
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


# These two are in this light module since Ray's controller and the waiting task unpickle them as well: they would
# import for seconds what only the worker needs.


def _work(config: dict[str, Any]) -> None:
    with quick_imports("transformers", "peft"):
        from pipelines.train.worker import train_worker
    train_worker(config)


def _finish(*arguments: Any) -> Outcome:
    with quick_imports("transformers", "peft"):
        from pipelines.train.finish import finish
    return finish(*arguments)


def _fatal(job: TrainJob) -> str | None:
    """Why trying again is pointless, None if it is not."""
    file = join(job.work, FATAL)
    return job.storage.read(file).decode() if job.storage.kind(file) == "file" else None
