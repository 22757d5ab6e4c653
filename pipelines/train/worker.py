"""What every Ray Train worker runs: load the base, take batches from its makers, train, keep checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.storage import join
from glad_core.bundle.model import AUTOCAST, Model, load_bundle
from glad_core.errors import GladError
from glad_core.judge import detect
from glad_core.training import losses
from glad_core.training.loop import StepResult, TrainState, category_prompts, fine_tune
from glad_core.verdict import NotFinite, Request
from pipelines.models.find import local_bundle
from pipelines.train.batches import batches
from pipelines.train.checkpoints import Checkpoints, resume, trained
from pipelines.train.failure import give_up
from pipelines.train.good_images import GoodImage
from pipelines.train.kept_frames import read_frames
from pipelines.train.metrics import note
from pipelines.train.side_by_side import send_event
from pipelines.train.spec import FATAL, TrainJob

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
    except Exception as error:
        message = give_up(job, error)
        if message is None or job.workers > 1:
            raise
        ray.train.report({"fatal": message})


def _train(job: TrainJob, events: Any) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if trained():
        return
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    if device.type == "cuda":
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    model = load_bundle(local_bundle(job.base, job.storage), device, model_id=job.base_id)
    send_event(events, job.name, "prepare")
    state = TrainState.start(make_loss(job, model, rank, world), job.recipe)
    resume(job, state, rank, device)
    stream = batches(
        job.images,
        job.recipe,
        job.part,
        job.framings(model.settings.resolution),
        job.storage,
        job.textures,
        first_step=state.step,
        rank=rank,
        world=world,
        makers=job.makers,
        kept=job.kept,
    )
    checkpoints = Checkpoints(job, rank, world)
    done: list[StepResult] = []
    last_note = 0.0
    for step in fine_tune(state, stream, job.recipe):
        done.append(step)
        if rank == 0 and (time.monotonic() - last_note > NOTE_EVERY or step.step == job.recipe.steps):
            last_note = time.monotonic()
            send_event(events, job.name, "train", done=step.step, total=job.recipe.steps, note=note(done, world))
        if checkpoints.due(step.step):
            checkpoints.save(state, done)
            done = []


def make_loss(job: TrainJob, model: Model, rank: int = 0, world: int = 1) -> Any:
    """The loss module of the trained part, with everything that is computed once for every good image."""
    recipe, dtype = job.recipe, AUTOCAST[job.recipe.autocast]
    if job.part == "vae":
        return losses.CodecLoss(model.vae, model.final_features, dtype)
    if job.part == "dino":
        frozen = model.final_features
        adapted = copy.deepcopy(frozen).eval().requires_grad_(False)
        rebuilt = _for_each(job, model, _reconstructed, rank, world)[0]
        size = model.settings.feature_resolution
        return losses.FeatureLoss(adapted, frozen, rebuilt, size, recipe.keep, dtype)
    # A tile seldom comes again, and of many pictures few do: encoding them all would take longer than the training.
    whole = len(framings := job.framings(model.settings.resolution)) == 1 and framings[0].kind != "tiles"
    clean: tuple[Tensor, Tensor] | None = None
    if whole and len(job.images) <= recipe.steps * recipe.batch_size:
        mean, std = _for_each(job, model, _posterior, rank, world)
        clean = (mean, std)
    if model.device.type == "cpu":
        model.vae.to(memory_format=torch.channels_last)  # encodes in two thirds of the time
    prompts, learn = category_prompts(model, job.categories)
    row = {name: number for number, name in enumerate(job.categories)}
    return losses.AtpLoss(
        model.unet,
        model.vae,
        model.alphas,
        clean,
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
        (framing,) = job.framings(model.settings.resolution)
        pixels = np.stack([frames.frames[0] for frames in read_frames(images, (framing,), job.storage, job.kept)])
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
