"""The batches of training: processes beside the trainer decode images and put anomalies into them.

The process with the GPU only takes finished batches. The content of a batch follows from its position in the sample
order alone (`samples.sample_at`), so a resumed run gets the same batches, whichever process makes them. The makers are
plain actors that use CPUs of their trainer's share. Ray Data would divide what all trainers leave over among all
streams, on each machine by itself and rounded down: with as many streams as a machine has CPUs left, none for each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cluster import session
from cluster.quick_imports import quick_imports
from cluster.storage import Storage, StorageError
from glad_core.decoding.picture import ImageError
from glad_core.errors import GladError
from glad_core.training.recipe import Part, Recipe
from glad_core.views import Framing, random_tile
from pipelines.train.good_images import GoodImage
from pipelines.train.kept_frames import Kept, read_frames
from pipelines.train.textures import texture_pool

if TYPE_CHECKING:
    import numpy as np
    import torch

AHEAD = 2  # batches asked of each maker, so that it has the next one to make when it hands one over
MAX_DEATHS = 8  # of a maker, before its trainer gives up


class _Maker:
    """Makes the rows of batches; an actor."""

    def __init__(
        self,
        images: list[GoodImage],
        recipe: Recipe,
        part: Part,
        framings: tuple[Framing, ...],
        storage: Storage,
        textures: str | None,
        kept: Kept | None,
    ) -> None:
        with quick_imports():
            import torch

            from glad_core.training import samples
        torch.set_num_threads(1)
        self.samples = samples
        self.images, self.recipe, self.part, self.framings = images, recipe, part, framings
        self.storage, self.textures, self.kept = storage, textures, kept

    def make(self, positions: range) -> dict[str, np.ndarray]:
        """The rows of `samples.make_rows` at these positions of the sample order."""
        chosen = [self.samples.sample_at(self.recipe, position, len(self.images)) for position in positions]
        side = self.framings[0].side
        images = [self.images[sample.index] for sample in chosen]
        pixels = [
            random_tile(frames.frames, side, sample.tile_seed)
            for sample, frames in zip(chosen, read_frames(images, self.framings, self.storage, self.kept), strict=True)
        ]
        pool = texture_pool(self.storage, self.textures, side) if self.textures else None
        return self.samples.make_rows(pixels, chosen, self.recipe, self.part, pool)


def batches(
    images: list[GoodImage],
    recipe: Recipe,
    part: Part,
    framings: tuple[Framing, ...],
    storage: Storage,
    textures: str | None,
    *,
    first_step: int,
    rank: int = 0,
    world: int = 1,
    makers: int = 1,
    kept: Kept | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """This worker's share of every step from ``first_step`` on, in order, as rows of `samples.make_rows`.

    The tensors share Ray's memory and must not be written to.

    Args:
        rank, world: this worker among all.
        makers: processes that make the batches, on this machine.
        kept: pictures that need not be decoded anew.

    Raises:
        GladError, StorageError, ImageError: an image or a texture cannot be read any more.
    """
    import ray
    import torch
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    share = recipe.batch_size // world
    starts = range(first_step * recipe.batch_size, recipe.steps * recipe.batch_size, recipe.batch_size)
    waiting = iter(range(start + rank * share, start + (rank + 1) * share) for start in starts)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_Maker).options(
        num_cpus=0, max_restarts=MAX_DEATHS, max_task_retries=-1, scheduling_strategy=here
    )
    settings = (images, recipe, part, framings, storage, textures, kept)
    pool: deque[Any] = deque(actor.remote(*settings) for _ in range(min(makers, len(starts))))  # the next one first
    pending: deque[Any] = deque()
    while True:
        while len(pending) < AHEAD * len(pool) and (positions := next(waiting, None)) is not None:
            pending.append(pool[0].make.remote(positions))
            pool.rotate(-1)
        if not pending:
            return
        try:
            rows = ray.get(pending.popleft())
        except ray.exceptions.RayTaskError as error:
            raise session.root_cause(error, GladError, StorageError, ImageError) from error
        yield {name: torch.from_numpy(values) for name, values in rows.items()}
