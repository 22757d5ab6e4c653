"""The batches of training: Ray Data tasks on free CPUs decode images and put anomalies into them.

The worker with the GPU only takes finished batches. The content of a batch follows from its position in the sample
order alone (`samples.sample_at`), so a resumed run gets the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cluster.session import configure_ray_data
from cluster.storage import Storage
from glad_core.training.recipe import Part, Recipe
from pipelines.train.good_images import GoodImage
from pipelines.train.pixels import read_picture, texture_pool
from pipelines.train.survey import DATA_CPUS

if TYPE_CHECKING:
    import torch

PREFETCHED = 4  # batches ready ahead of the step


def batches(
    images: list[GoodImage],
    recipe: Recipe,
    part: Part,
    resolution: int,
    storage: Storage,
    textures: str | None,
    *,
    first_step: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """This worker's share of every step from ``first_step`` on, in order, as rows of `samples.make_rows`.

    Args:
        rank, world: this worker among all.
    """
    import ray.data
    import torch

    configure_ray_data()
    share = recipe.batch_size // world
    positions = [
        {"position": step * recipe.batch_size + rank * share + index}
        for step in range(first_step, recipe.steps)
        for index in range(share)
    ]
    if not positions:
        return

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch  # here: Ray Data's own actor also unpickles this function, and need not import what the tasks do

        from glad_core.training import samples

        torch.set_num_threads(1)
        chosen = [samples.sample_at(recipe, int(position), len(images)) for position in batch["position"]]
        pixels = [read_picture(storage, images[sample.index].uri, resolution).pixels for sample in chosen]
        pool = texture_pool(storage, textures, resolution) if textures else None
        return samples.make_rows(pixels, chosen, recipe, part, pool)

    # Items need no read task, which would ask for a whole CPU. A task makes the rows of two steps.
    items = ray.data.from_items(positions, override_num_blocks=max(1, len(positions) // (2 * share)))
    items.context.execution_options.preserve_order = True
    rows = items.map_batches(make, batch_size=share, num_cpus=DATA_CPUS)
    # A split is run by an actor of its own: Ray Data's loop would contend with the training loop for the interpreter.
    stream = rows.streaming_split(1)[0]
    for batch in stream.iter_batches(batch_size=share, prefetch_batches=PREFETCHED, batch_format="numpy"):
        yield {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
