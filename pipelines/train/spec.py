"""One training run: its description, its identity, and the names of the files in its folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from cluster.storage import Storage, join, local_path
from glad_core.bundle.settings import View
from glad_core.training.recipe import Part, Recipe
from glad_core.views import Framing
from pipelines.train.good_images import GoodImage
from pipelines.train.kept_frames import TASK_MEMORY, Kept
from pipelines.train.survey import Survey

# In a run's folder; FATAL says why trying again is pointless.
IDENTITY, FATAL, METRICS, TENSORBOARD = "identity.json", "fatal.txt", "metrics", "tensorboard"
CHECKPOINT, FINAL = "checkpoint.pt", "final.safetensors"  # in each of its checkpoints; in the last one FINAL instead


@dataclass(frozen=True)
class TrainJob:
    """One training run, as every task and worker of it receives it.

    ``base_id`` is the model id of the bundle ``base`` when the job began. ``categories`` are those of ``images``;
    several share one model. ``views`` are None until they are chosen from the survey of the images. ``work`` is the
    run's folder, local or S3. ``cpus`` and ``gpus`` are per worker, and so are ``makers``, the processes that make its
    batches. While it trains, decoded pictures are ``kept``, ``kept_bytes`` at most.
    """

    name: str
    base: str
    base_id: str
    part: Part
    recipe: Recipe
    categories: list[str]
    images: list[GoodImage]
    textures: str | None
    target_fpr: float
    work: str
    storage: Storage
    workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    makers: int = 1
    device: str = "cpu"
    views: tuple[View, ...] | None = None
    white_level: float | None = None
    kept_bytes: int = 0
    kept: Kept | None = None

    def framings(self, resolution: int) -> tuple[Framing, ...]:
        """How training sees pictures: as the bundle's views do. Features are adapted to whole pictures."""
        views = self.views or (View(),)
        if self.part == "dino":
            return (Framing("squash", resolution, white=self.white_level),)
        return tuple(Framing(view.kind, resolution, view.scale, view.overlap, self.white_level) for view in views)

    @property
    def threads(self) -> int:
        """Threads of PyTorch; beside a GPU most of the CPUs are for the makers.

        Rounded up: on two cores, of which a worker has one and a half, two threads take 1.0 s a step, one takes 1.3.
        """
        return 1 if self.gpus else math.ceil(self.cpus)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What each worker asks Ray for; its makers are part of it."""
        return {"CPU": self.cpus, "memory": TASK_MEMORY} | ({"GPU": self.gpus} if self.gpus else {})

    def identity(self, surveyed: Survey) -> dict[str, Any]:
        """Everything that decides the resulting bundle; runs of equal identity are the same run."""
        return {
            "base": self.base_id,
            "part": self.part,
            "categories": self.categories,
            "dataset": surveyed.fingerprint,
            "textures": self.textures,
            "recipe": self.recipe.model_dump(),
            "target FPR": self.target_fpr,
            "views": [view.model_dump() for view in self.views or ()],
        }

    def run_id(self, surveyed: Survey) -> str:
        """A short hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(surveyed), sort_keys=True).encode()).hexdigest()[:16]


class Outcome(NamedTuple):
    """The result of a run in words, and the model id of its bundle."""

    words: str
    model_id: str


Deliver = Callable[[Path, TrainJob, Survey], Outcome]  # brings a finished bundle's folder where it belongs


def clear_work(storage: Storage, work: str, beside: str) -> None:
    """Move a finished run's metrics ``beside`` the bundle and delete the rest of its folder."""
    filesystem, path = storage.resolve(join(work, METRICS))
    filesystem_out, path_out = storage.resolve(f"{beside}.training.parquet")
    table = pq.read_table(path, filesystem=filesystem)
    pq.write_table(table.sort_by("step"), path_out, filesystem=filesystem_out)
    events = join(work, TENSORBOARD)
    if storage.kind(events) == "folder":
        Path(local_path(events)).rename(local_path(f"{beside}.tensorboard"))
    storage.delete_folder(work)
