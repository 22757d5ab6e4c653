"""Failures of a training run that no other try can mend: one line in the run's folder, which ends every try."""

from __future__ import annotations

import errno
from contextlib import suppress

import torch

from cluster.storage import StorageError, join
from glad_core.errors import GladError
from glad_core.training.recipe import Recipe
from pipelines.train.spec import FATAL, TrainJob


def give_up(job: TrainJob, error: BaseException) -> str | None:
    """Write down why trying again is pointless; returns the line, or None if another try may succeed."""
    message = reason(error, job.recipe)
    if message is not None:
        with suppress(OSError, StorageError):  # on a full disk
            job.storage.write(join(job.work, FATAL), message.encode())
    return message


def reason(error: BaseException, recipe: Recipe) -> str | None:
    """One line for the user if trying again is pointless, else None."""
    if isinstance(error, GladError):
        return str(error)
    if out_of_memory(error):
        return f"the device has too little memory: {save_memory(recipe)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the disk'} is full: make room and give the same command again"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or this machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def save_memory(recipe: Recipe) -> str:
    """The options that would need less memory than ``recipe`` does, those that cost least first."""
    ways = []
    if (recipe.micro_batch or recipe.batch_size) > 1:
        ways.append(f"lower --micro-batch (now {recipe.micro_batch or 'that of --batch-size'})")
    if recipe.optimizer == "adamw":
        ways.append("use --optimizer adamw8bit")
    if recipe.autocast == "off":
        ways.append("use --precision bf16")
    if not recipe.gradient_checkpointing:
        ways.append("add --gradient-checkpointing")
    if recipe.ema_decay is not None:
        ways.append("leave out --ema")
    return ", ".join(ways) or "every option that saves some is in use; train on a device with more"
