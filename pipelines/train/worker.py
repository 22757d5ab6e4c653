"""What every Ray Train worker runs: load the base, take batches from Ray Data, train, report, keep checkpoints."""

from __future__ import annotations

import copy
import errno
import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.storage import is_s3, join
from glad_core.bundle.model import AUTOCAST, Model, load_bundle
from glad_core.errors import GladError
from glad_core.judge import detect
from glad_core.training import losses
from glad_core.training.loop import StepResult, TrainState, add_reports, category_prompts, fine_tune
from glad_core.verdict import NotFinite, Request
from pipelines.models.find import local_bundle
from pipelines.train.batches import batches
from pipelines.train.good_images import GoodImage
from pipelines.train.pixels import read_pixels
from pipelines.train.side_by_side import send_event
from pipelines.train.spec import CHECKPOINT, FATAL, FINAL, METRICS, TENSORBOARD, TrainJob

CHECKPOINT_EVERY = 100  # steps
NOTE_EVERY = 0.5  # seconds between two events


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point; ``config`` holds the ``job`` and the queue of its ``events``.

    A failure that no retry can mend is written beside the checkpoints. A single worker then ends. One of several fails,
    since the others wait for it, and the group that Ray Train starts next finds the file and ends at once.
    """
    import ray.train

    job: TrainJob = config["job"]
    fatal = join(job.work, FATAL)
    if job.storage.kind(fatal) == "file":
        ray.train.report({"fatal": job.storage.read(fatal).decode()})
        return
    try:
        _train(job, config["events"])
    except (GladError, torch.OutOfMemoryError, OSError) as error:
        message = _reason(error)
        if message is not None:
            job.storage.write(fatal, message.encode())
        if message is None or job.workers > 1:
            raise
        ray.train.report({"fatal": message})


def _reason(error: Exception) -> str | None:
    """One line for the user if trying again is pointless, else None."""
    if isinstance(error, GladError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory: lower --micro-batch, add --gradient-checkpointing or --precision bf16"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the disk'} is full: make room and give the same command again"
    return None


def _train(job: TrainJob, events: Any) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(job.threads)
    device = ray.train.torch.get_device() if job.gpus else torch.device(job.device)
    model = load_bundle(local_bundle(job.base, job.storage), device, model_id=job.base_id)
    send_event(events, job.name, "prepare")
    state = _resumed(TrainState.start(make_loss(job, model, rank, world), job.recipe), device)
    stream = batches(
        job.images,
        job.recipe,
        job.part,
        model.settings.resolution,
        job.storage,
        job.textures,
        first_step=state.step,
        rank=rank,
        world=world,
    )
    done: list[StepResult] = []
    last_note = 0.0
    for step in fine_tune(state, stream, job.recipe):
        done.append(step)
        if rank == 0 and (time.monotonic() - last_note > NOTE_EVERY or step.step == job.recipe.steps):
            last_note = time.monotonic()
            note = _note(done, world)
            send_event(events, job.name, "train", done=step.step, total=job.recipe.steps, note=note)
        if step.step % CHECKPOINT_EVERY == 0 or step.step == job.recipe.steps:
            _report(job, state, done, rank, world)
            done = []


def _resumed(state: TrainState, device: torch.device) -> TrainState:
    """The state, brought to Ray Train's last checkpoint if there is one."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / CHECKPOINT, map_location=device, weights_only=True)
        state.load_state_dict(saved)
    return state


def make_loss(job: TrainJob, model: Model, rank: int = 0, world: int = 1) -> Any:
    """The loss module of the trained part, with everything that is computed once for every good image."""
    recipe, dtype = job.recipe, AUTOCAST[job.recipe.autocast]
    if job.part == "vae":
        return losses.CodecLoss(model.vae, model.final_features, dtype)
    if job.part == "dino":
        frozen = model.features
        adapted = copy.deepcopy(model.final_features).eval().requires_grad_(False)
        rebuilt = _for_each(job, model, _reconstructed, rank, world)[0]
        size = model.settings.feature_resolution
        return losses.FeatureLoss(adapted, frozen, rebuilt, size, recipe.keep, dtype)
    mean, std = _for_each(job, model, _posterior, rank, world)
    prompts, learn = category_prompts(model, job.categories)
    row = {name: number for number, name in enumerate(job.categories)}
    return losses.AtpLoss(
        model.unet,
        model.vae,
        model.alphas,
        (mean, std),
        prompts,
        torch.tensor([row[image.category] for image in job.images]),
        blend=recipe.blend,
        max_timestep=recipe.max_timestep,
        autocast=dtype,
        learn_prompts=learn,
    )


@torch.no_grad()
def _for_each(
    job: TrainJob,
    model: Model,
    make: Callable[[Model, list[GoodImage], np.ndarray], tuple[Tensor, ...]],
    rank: int,
    world: int,
) -> list[Tensor]:
    """``make``'s tensors for all good images; the workers share the work and exchange the tensors."""
    tensors: dict[int, tuple[Tensor, ...]] = {}
    size = job.recipe.micro_batch or max(1, job.recipe.batch_size // world)
    own = range(rank, len(job.images), world)
    for start in range(0, len(own), size):
        indices = own[start : start + size]
        images = [job.images[index] for index in indices]
        pixels = np.stack(read_pixels(images, model.settings.resolution, job.storage))
        parts = make(model, images, pixels)
        tensors |= {index: tuple(part[row] for part in parts) for row, index in enumerate(indices)}
    if world > 1:
        gathered: list[Any] = [None] * world
        torch.distributed.all_gather_object(gathered, tensors)
        tensors = {index: parts for others in gathered for index, parts in others.items()}
    return [torch.stack(column) for column in zip(*(tensors[i] for i in range(len(job.images))), strict=True)]


def _posterior(model: Model, images: list[GoodImage], pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    posterior = model.vae.encode(losses.to_pixels(torch.from_numpy(pixels)).to(model.device)).latent_dist
    return posterior.mean.cpu(), posterior.std.cpu()


def _reconstructed(model: Model, images: list[GoodImage], pixels: np.ndarray) -> tuple[Tensor]:
    """The bundle's reconstructions of good images, uint8 [B, R, R, 3]."""
    requests = [Request(image.digest, array, image.category) for image, array in zip(images, pixels, strict=True)]
    rebuilt: list[np.ndarray] = []
    try:
        for detection in detect(model, requests):
            rebuilt.append(detection.reconstruction)
    except NotFinite as error:
        raise GladError(f"model {model.model_id}, {images[len(rebuilt)].uri}: {error}") from error
    return (torch.from_numpy(np.stack(rebuilt)),)


def _note(done: list[StepResult], world: int) -> str:
    recent = done[-50:]
    seconds = sum(step.seconds for step in recent)
    loss = sum(step.loss for step in recent) / len(recent)
    rate = world * sum(step.images for step in recent) / seconds
    return f"loss {loss:.4f}, {rate:.1f} images/s, {sum(s.data_seconds for s in recent) / seconds:.0%} waiting for data"


def _report(job: TrainJob, state: TrainState, done: list[StepResult], rank: int, world: int) -> None:
    """Metrics of the steps since the last report, and a checkpoint; all workers meet here."""
    import ray.train

    rows = metric_rows(done, world)
    if rank != 0:
        ray.train.report({"step": state.step})
        return
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    first = rows[0]["step"]
    job.storage.write(join(job.work, METRICS, f"part-{first:08d}.parquet"), stream.getvalue())
    _log(job, rows)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state.state_dict(), Path(folder) / CHECKPOINT)
        if state.step == job.recipe.steps:
            state.finish()
            weights = {name: value.detach().cpu().contiguous() for name, value in state.loss.state_dict().items()}
            save_file(weights, Path(folder) / FINAL)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": state.step, "loss": rows[-1]["loss"]}, checkpoint=checkpoint)


def metric_rows(done: list[StepResult], world: int) -> list[dict[str, float]]:
    """One row per step: loss, learning rate, images/s, share of the time spent waiting for data, the loss's report."""
    gathered: list[list[StepResult]] = [done]
    if world > 1:
        gathered = [[] for _ in range(world)]
        torch.distributed.all_gather_object(gathered, done)
    rows = []
    for steps in zip(*gathered, strict=True):
        report: losses.Report = {}
        for step in steps:
            report = add_reports(report, step.report)
        seconds = max(step.seconds for step in steps)
        rows.append(
            {
                "step": steps[0].step,
                "loss": sum(step.loss for step in steps) / len(steps),
                "learning_rate": steps[0].learning_rate,
                "images_per_second": sum(step.images for step in steps) / seconds,
                "data_wait_share": max(step.data_seconds for step in steps) / seconds,
                **{name: total / count if count else float("nan") for name, (total, count) in report.items()},
            }
        )
    return rows


def _log(job: TrainJob, rows: list[dict[str, float]]) -> None:
    """The same numbers for TensorBoard, if the run's folder is local, and for MLflow, if a server is configured."""
    from tensorboardX import SummaryWriter

    if not is_s3(job.work):
        with SummaryWriter(join(job.work, TENSORBOARD)) as writer:
            for row in rows:
                for name, value in row.items():
                    writer.add_scalar(name, value, int(row["step"]))
    if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow"):
        import mlflow

        mlflow.set_experiment("glad")
        runs = mlflow.search_runs(filter_string=f"tags.work = '{job.work}'", output_format="list")
        with mlflow.start_run(run_id=runs[0].info.run_id if runs else None, run_name=job.name):
            mlflow.set_tag("work", job.work)
            for row in rows:
                numbers = {name: value for name, value in row.items() if value == value}  # MLflow refuses NaN
                mlflow.log_metrics(numbers, step=int(row["step"]))
