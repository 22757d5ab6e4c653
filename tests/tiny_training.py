"""A tiny training run in one process, for tests of the loop, the losses, the worker and the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from glad_core.bundle.model import Model
from glad_core.training import samples
from glad_core.training.loop import TrainState, fine_tune
from glad_core.training.losses import AtpLoss, Rows, to_pixels
from glad_core.training.recipe import Recipe

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
