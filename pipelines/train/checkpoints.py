"""Checkpoints of a training run: seldom enough that they cost little time, often enough that little is lost.

A checkpoint blocks training while the state is copied to memory; a thread of Ray Train's then writes the copy straight
to storage, while training goes on. Metrics go first: a checkpoint that counts has all rows up to its step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow import fs as pafs
from ray._private.utils import get_system_memory, get_used_memory
from ray.train import Checkpoint, CheckpointUploadMode
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves, tree_map_only

from glad_core.training.loop import StepResult, TrainState
from pipelines.train.failure import give_up
from pipelines.train.metrics import forget_after, metric_rows, write_rows
from pipelines.train.spec import CHECKPOINT, FINAL, TrainJob

COST = 0.05  # share of the time that checkpoints may take
LEAST_SECONDS = 5.0  # between two of them, and before the first, which shows what they cost
SPARE = 1.5  # times the state's size that has to be free for a copy in memory


class Checkpoints:
    """Saves a run's state when it is time. Every worker of a group asks `due` after every step and then calls `save`.

    ``blocked`` counts the seconds that training has waited for it.
    """

    def __init__(self, job: TrainJob, rank: int, world: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.job, self.rank, self.world, self.clock = job, rank, world, clock
        self.writing = False  # a copy is on its way to storage
        self.next = clock() + LEAST_SECONDS
        self.blocked = 0.0

    def due(self, step: int) -> bool:
        """Whether to save now. The first worker's clock decides for all."""
        if step == self.job.recipe.steps:
            return True
        wanted = not self.writing and self.clock() >= self.next
        if self.world > 1:
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            answer = torch.tensor(int(wanted), device=device)
            torch.distributed.broadcast(answer, 0)
            wanted = bool(answer)
        return wanted

    def save(self, state: TrainState, done: list[StepResult]) -> None:
        """Report a checkpoint, and the metrics of the steps since the one before. All workers meet here."""
        started = self.clock()
        rows = metric_rows(done, self.world)
        if self.rank != 0:
            ray.train.report({"step": state.step}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        elif state.step == self.job.recipe.steps:
            self._save_last(state, rows)
        else:
            self._save_between(state, rows, started)
        self.blocked += self.clock() - started

    def _save_last(self, state: TrainState, rows: list[dict[str, float]]) -> None:
        write_rows(self.job, rows)
        state.finish()
        weights = {name: value.detach().cpu().contiguous() for name, value in state.loss.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            save_file(weights, Path(folder) / FINAL)
            ray.train.report(_summary(rows), checkpoint=Checkpoint.from_directory(folder))

    def _save_between(self, state: TrainState, rows: list[dict[str, float]], started: float) -> None:
        content = state.state_dict()
        copied = _fits(content)
        if copied:
            content = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
        paused = self.clock() - started
        self.writing = True

        def write(unused: Checkpoint, name: str) -> Checkpoint:
            busy = time.thread_time()
            checkpoint = self._write(content, rows, name)
            # What writing computes may be taken from the training; waiting for storage is not, if there is a copy.
            cost = paused + time.thread_time() - busy if copied else self.clock() - started
            self.next = self.clock() + max(LEAST_SECONDS, cost / COST)
            self.writing = False
            return checkpoint

        ray.train.report(
            _summary(rows),
            checkpoint=Checkpoint(tempfile.gettempdir()),  # Ray wants one here; `write` makes the real one
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC if copied else CheckpointUploadMode.SYNC,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
        )

    def _write(self, content: dict[str, Any], rows: list[dict[str, float]], name: str) -> Checkpoint:
        """Write rows and state to the run's folder. Ray Train tries again after a failure, unless it is hopeless."""
        try:
            write_rows(self.job, rows)
            filesystem, work = self.job.storage.resolve(self.job.work)
            folder = f"{work}/{name}"
            filesystem.create_dir(folder)
            with filesystem.open_output_stream(f"{folder}/{CHECKPOINT}") as stream:
                torch.save(content, stream)
        except Exception as error:
            give_up(self.job, error)
            raise
        return Checkpoint(folder, filesystem)


def resume(job: TrainJob, state: TrainState, rank: int, device: torch.device) -> None:
    """Bring ``state`` to Ray Train's last checkpoint, if there is one, and delete what came after it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / CHECKPOINT, map_location=device, weights_only=True)
        state.load_state_dict(saved)
    if rank == 0:
        forget_after(job, state.step)
        _delete_checkpoints(job, but=checkpoint.path.rpartition("/")[2] if checkpoint else "")


def trained() -> bool:
    """Whether the last checkpoint is that of a finished training."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return False
    return checkpoint.filesystem.get_file_info(f"{checkpoint.path}/{FINAL}").type == pafs.FileType.File


def _delete_checkpoints(job: TrainJob, but: str) -> None:
    """Delete those that no report names: whoever wrote them was killed before it could report."""
    filesystem, work = job.storage.resolve(job.work)
    for info in filesystem.get_file_info(pafs.FileSelector(work, allow_not_found=True)):
        if info.type == pafs.FileType.Directory and info.base_name.startswith("checkpoint_") and info.base_name != but:
            with suppress(FileNotFoundError):
                filesystem.delete_dir(info.path)


def _fits(content: dict[str, Any]) -> bool:
    """Whether this machine, or the container, has room for a copy."""
    size = sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor))
    return get_system_memory() - get_used_memory() > SPARE * size


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    return {"step": rows[-1]["step"], "loss": rows[-1]["loss"]}
