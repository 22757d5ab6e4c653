import errno

import pytest
import torch

from glad_core.errors import GladError
from glad_core.training.recipe import Recipe
from pipelines.train.failure import reason, save_memory


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GladError("training diverged"), "training diverged"),
        (torch.OutOfMemoryError("CUDA"), "the device has too little memory: lower --micro-batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "too little memory"),
        (MemoryError(), "too little memory"),
        (OSError(errno.ENOSPC, "full", "/out"), "/out is full: make room"),
        (OSError(errno.EIO, "a cable"), None),  # another try may succeed
        (RuntimeError("a peer is gone"), None),
    ],
)
def test_only_failures_that_no_retry_can_mend_have_a_reason(error: Exception, words: str | None) -> None:
    message = reason(error, Recipe())
    assert message is None if words is None else words in message


def test_only_options_that_would_help_are_named() -> None:
    assert save_memory(Recipe(micro_batch=4, ema_decay=0.9)) == (
        "lower --micro-batch (now 4), use --optimizer adamw8bit, use --precision bf16, add --gradient-checkpointing, "
        "leave out --ema"
    )
    assert save_memory(Recipe(batch_size=8)).startswith("lower --micro-batch (now that of --batch-size), ")
    least = Recipe(micro_batch=1, optimizer="adamw8bit", autocast="bf16", gradient_checkpointing=True)
    assert save_memory(least) == "every option that saves some is in use; train on a device with more"
