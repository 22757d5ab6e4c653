"""Tiny training runs in one process, for tests of the loop, the losses, the worker and the job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from cluster.storage import Storage
from glad_core.bundle.model import Model, load_bundle
from glad_core.training import samples
from glad_core.training.loop import TrainState, fine_tune
from glad_core.training.losses import AtpLoss, Rows, to_pixels
from glad_core.training.recipe import Recipe
from glad_core.views import Framing
from pipelines.train.good_images import GoodImage
from pipelines.train.kept_frames import read_frames

RECIPE = Recipe(steps=6, batch_size=4, learning_rate=1e-3, lr_schedule="cosine", ema_decay=0.9)
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(10)]


def make_batches(
    recipe: Recipe, images: Sequence[np.ndarray] = IMAGES, first_step: int = 0, part: samples.Part = "unet"
) -> Iterator[Rows]:
    """The batches of every step from ``first_step`` on."""
    for step in range(first_step, recipe.steps):
        positions = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        chosen = [samples.sample_at(recipe, position, len(images)) for position in positions]
        arrays = samples.make_rows([images[sample.index] for sample in chosen], chosen, recipe, part)
        yield {name: torch.from_numpy(values) for name, values in arrays.items()}


def make_atp_loss(model: Model, images: Sequence[np.ndarray] = IMAGES, at_a_time: int = 10) -> AtpLoss:
    """The UNet's loss on good images; ``at_a_time`` of them are encoded together, which decides the last bits."""
    with torch.no_grad():
        starts = range(0, len(images), at_a_time)
        parts = [to_pixels(torch.from_numpy(np.stack(images[start : start + at_a_time]))) for start in starts]
        posteriors = [model.vae.encode(part).latent_dist for part in parts]
    clean = (torch.cat([part.mean for part in posteriors]), torch.cat([part.std for part in posteriors]))
    categories = torch.zeros(len(images), dtype=torch.long)
    return AtpLoss(model.unet, model.vae, model.alphas, clean, model.prompt_cond, categories, blend=True)


def train(state: TrainState, recipe: Recipe, limit: int = 10**6, part: samples.Part = "unet") -> list[float]:
    """Train on `IMAGES` from the state's step on, at most ``limit`` steps; returns their losses."""
    batches = make_batches(recipe, first_step=state.step, part=part)
    return [step.loss for step in islice(fine_tune(state, batches, recipe), limit)]


def as_glad_train(dataset: Path, base: Path, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The UNet's weights and losses of `glad train` on category ``part``, without Ray or any interruption."""
    model = load_bundle(base)
    recipe = Recipe(steps=steps, batch_size=2, learning_rate=1e-4)
    files = {path.name: str(path) for path in (dataset / "part/train/good").iterdir()}
    by_hash = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    fit = [GoodImage(files[name], "part") for name in sorted(by_hash[len(files) // 3 :])]  # the others are held out
    images = [frames.frames[0] for frames in read_frames(fit, (Framing("squash", 32),), Storage())]
    state = TrainState.start(make_atp_loss(model, images, at_a_time=2), recipe)
    losses = [step.loss for step in fine_tune(state, make_batches(recipe, images), recipe)]
    return model.unet.state_dict(), losses
