"""The metrics of a training run: a row per step, in files of the run's folder, for TensorBoard and for MLflow."""

from __future__ import annotations

import importlib.util
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.storage import is_s3, join
from glad_core.training import losses
from glad_core.training.loop import StepResult, add_reports
from pipelines.train.spec import METRICS, TENSORBOARD, TrainJob


def note(done: list[StepResult], world: int) -> str:
    """Loss, speed and waiting time of the latest steps, in words."""
    recent = done[-50:]
    seconds = sum(step.seconds for step in recent)
    loss = sum(step.loss for step in recent) / len(recent)
    rate = world * sum(step.images for step in recent) / seconds
    return f"loss {loss:.4f}, {rate:.1f} images/s, {sum(s.data_seconds for s in recent) / seconds:.0%} waiting for data"


def metric_rows(done: list[StepResult], world: int) -> list[dict[str, float]]:
    """One row per step: loss, learning rate, images/s, share of the time spent waiting for data, the loss's report.

    All ``world`` workers meet here.
    """
    gathered: list[list[StepResult]] = [done]
    if world > 1:
        gathered = [[] for _ in range(world)]
        torch.distributed.all_gather_object(gathered, done)
    rows = []
    for steps in zip(*gathered, strict=True):
        report: losses.Report = {}
        for step in steps:
            report = add_reports(report, step.report)
        seconds = max(step.seconds for step in steps)
        rows.append(
            {
                "step": steps[0].step,
                "loss": sum(step.loss for step in steps) / len(steps),
                "learning_rate": steps[0].learning_rate,
                "images_per_second": sum(step.images for step in steps) / seconds,
                "data_wait_share": max(step.data_seconds for step in steps) / seconds,
                **{name: total / count if count else float("nan") for name, (total, count) in report.items()},
            }
        )
    return rows


def write_rows(job: TrainJob, rows: list[dict[str, float]]) -> None:
    """Keep the rows in a file of the run's folder that is named after the first step, and show them elsewhere."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    job.storage.write(join(job.work, METRICS, f"part-{int(rows[0]['step']):08d}.parquet"), stream.getvalue())
    _show(job, rows)


def forget_after(job: TrainJob, step: int) -> None:
    """Delete the files of steps after the one that a run resumes from: it makes those steps again."""
    folder = join(job.work, METRICS)
    if job.storage.kind(folder) == "folder":
        parts = [path for path, _ in job.storage.walk(folder) if path.startswith("part-")]
        late = [part for part in parts if int(part.removeprefix("part-").removesuffix(".parquet")) > step]
        job.storage.delete_files(join(folder, part) for part in late)


def _show(job: TrainJob, rows: list[dict[str, float]]) -> None:
    """The same numbers for TensorBoard, if the run's folder is local, and for MLflow, if a server is configured."""
    from tensorboardX import SummaryWriter

    if not is_s3(job.work):
        with SummaryWriter(join(job.work, TENSORBOARD), purge_step=int(rows[0]["step"])) as writer:
            for row in rows:
                for name, value in row.items():
                    writer.add_scalar(name, value, int(row["step"]))
    if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow"):
        import mlflow

        mlflow.set_experiment("glad")
        runs = mlflow.search_runs(filter_string=f"tags.work = '{job.work}'", output_format="list")
        with mlflow.start_run(run_id=runs[0].info.run_id if runs else None, run_name=job.name):
            mlflow.set_tag("work", job.work)
            for row in rows:
                numbers = {name: value for name, value in row.items() if value == value}  # MLflow refuses NaN
                mlflow.log_metrics(numbers, step=int(row["step"]))
