import errno
import math

import pytest
import torch

from glad_core.errors import GladError
from glad_core.training.loop import StepResult
from pipelines.train import worker


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GladError("training diverged"), "training diverged"),
        (torch.OutOfMemoryError("CUDA"), "lower --micro-batch"),
        (OSError(errno.ENOSPC, "full", "/out"), "/out is full: make room"),
        (OSError(errno.EIO, "a cable"), None),  # another try may succeed
    ],
)
def test_only_failures_that_no_retry_can_mend_have_a_reason(error: Exception, reason: str | None) -> None:
    message = worker._reason(error)
    assert message is None if reason is None else reason in message


def test_metrics_of_a_step() -> None:
    report = {"loss_normal": (6.0, 3.0), "loss_t0": (0.0, 0.0)}
    steps = [StepResult(number, 0.5 * number, report, 1e-4, 8, 2.0, 0.5) for number in (1, 2)]
    first, second = worker.metric_rows(steps, world=1)
    assert first | {"loss_t0": None} == {
        "step": 1,
        "loss": 0.5,
        "learning_rate": 1e-4,
        "images_per_second": 4.0,
        "data_wait_share": 0.25,
        "loss_normal": 2.0,
        "loss_t0": None,
    }
    assert math.isnan(first["loss_t0"])  # no image was in that band of timesteps
    assert second["step"] == 2


def test_the_note_shows_loss_rate_and_waiting() -> None:
    steps = [StepResult(number, loss, {}, 1e-4, 8, 2.0, 0.5) for number, loss in ((1, 0.25), (2, 0.75))]
    assert worker._note(steps, world=2) == "loss 0.5000, 8.0 images/s, 25% waiting for data"
