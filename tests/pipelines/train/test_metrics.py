import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from cluster.storage import Storage
from glad_core.training.loop import StepResult
from pipelines.train import metrics
from pipelines.train.plan import TrainRequest, plan_job
from pipelines.train.spec import METRICS


def test_metrics_of_a_step() -> None:
    report = {"loss_normal": (6.0, 3.0), "loss_t0": (0.0, 0.0)}
    steps = [StepResult(number, 0.5 * number, report, 1e-4, 8, 2.0, 0.5) for number in (1, 2)]
    first, second = metrics.metric_rows(steps, world=1)
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
    assert metrics.note(steps, world=2) == "loss 0.5000, 8.0 images/s, 25% waiting for data"


def test_a_resumed_run_neither_loses_nor_doubles_rows(tmp_path: Path, tiny_bundle) -> None:
    request = TrainRequest("", "nut", str(tiny_bundle), "", {})
    job = replace(plan_job(request, ["nut"], Storage(), name="nut", work=str(tmp_path / "work")))

    def rows(*steps: int) -> list[dict[str, float]]:
        return [{"step": step, "loss": 0.1} for step in steps]

    metrics.forget_after(job, 0)  # there is nothing yet
    # The checkpoint of step 3 was reported, those of 5 and 6 were not: the run goes on after step 3.
    for steps in ((1, 2, 3), (4, 5), (6,)):
        metrics.write_rows(job, rows(*steps))
    metrics.forget_after(job, 3)
    metrics.write_rows(job, rows(4))
    metrics.write_rows(job, rows(5, 6, 7))
    written = pq.read_table(tmp_path / "work" / METRICS)["step"].to_pylist()
    assert sorted(written) == [1, 2, 3, 4, 5, 6, 7]
