"""The plan of a training job before anything runs: its recipe, its folder and its share of the cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from cluster import session
from cluster.storage import Storage, StorageError, join
from glad_core.bundle.settings import View
from glad_core.errors import GladError
from glad_core.training.recipe import Part, Recipe
from pipelines.models.find import bundle_location, describe
from pipelines.train.kept_frames import DATA_CPUS, kept_bytes
from pipelines.train.spec import TrainJob
from pipelines.train.textures import load_textures

LEAST_CPUS = 0.25  # of a worker
MOST_MAKERS = 4  # that one GPU can use: each makes tens of images a second
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
    views: tuple[View, ...] | None = None
    exclude: str | None = None  # runs with feedback (`pipelines.runs.feedback`)
    include: str | None = None


def plan_job(request: TrainRequest, categories: list[str], storage: Storage, *, name: str, work: str) -> TrainJob:
    """The job as far as it is known before the survey of its images; checks the base and the recipe."""
    description = describe(request.base, storage)
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
    return TrainJob(
        name=name,
        base=bundle_location(request.base),
        base_id=description.model_id,
        part=request.part,
        recipe=recipe,
        categories=categories,
        images=[],
        textures=request.textures,
        target_fpr=request.target_fpr,
        work=work,
        storage=storage,
        workers=request.workers,
        views=request.views,
    )


def claim_work(storage: Storage, work: str) -> None:
    """Prove that the run's folder can be written, before any work."""
    try:
        storage.write(join(work, "written.txt"), b"a training run keeps its checkpoints and metrics here\n")
    except StorageError as error:
        raise StorageError(f"cannot write {work}: choose another --out ({error})") from error


def with_resources(job: TrainJob, request: TrainRequest, parallel: int = 1) -> TrainJob:
    """The job with its share of the connected cluster, if ``parallel`` such jobs run at a time.

    One GPU per worker if there are GPUs or the request is for cuda, with CPUs beside it (`gpu_share`); otherwise a
    share of the CPUs (`cpu_share`).

    Raises:
        GladError: more than this machine has. A cluster may grow, so nothing is refused there.
    """
    grows = request.address is not None
    job = replace(job, kept_bytes=kept_bytes(parallel))
    gpus = session.gpus(session.resources())
    if request.device == "cuda" or (request.device is None and gpus):
        if job.workers > gpus and not grows:
            raise GladError(f"{job.workers} workers need as many GPUs, this machine has {gpus:g}: lower --workers")
        cpus, makers = gpu_share(session.gpu_nodes())
        return replace(job, cpus=cpus, gpus=1.0, makers=makers, device="cuda")
    if request.device is not None:
        _check_device(request.device)
    share = cpu_share(session.node_cpus(), job.workers * parallel)
    if share < LEAST_CPUS and not grows:
        raise GladError(
            f"{job.workers * parallel} workers do not fit this machine's {sum(session.node_cpus()):g} CPUs: "
            "lower the number of workers"
        )
    return replace(job, cpus=max(share, LEAST_CPUS), device=request.device or "cpu")


def gpu_share(nodes: list[tuple[float, float]]) -> tuple[float, int]:
    """CPUs of a worker with a GPU, and how many of its batches' makers they hold.

    Every GPU of the cluster can have as many: one for the worker itself, the others for makers, with `DATA_CPUS`
    reserved on each node. A node with fewer than two CPUs a GPU still has one maker, which shares.

    Args:
        nodes: CPUs and GPUs of every node that has GPUs; empty if they are still to come, with two CPUs each at least.
    """
    share = min(((cpus - DATA_CPUS) / gpus for cpus, gpus in nodes), default=2.0)
    if share < 2:
        return max(LEAST_CPUS, math.floor(share * 100) / 100), 1
    makers = min(MOST_MAKERS, int(share) - 1)
    return 1.0 + makers, makers


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
