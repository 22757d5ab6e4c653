"""Checkpoints with a real state and slow uploads, but without Ray Train around them."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from ray.train import CheckpointUploadMode
from torch import nn

from cluster.storage import Storage
from glad_core.training.loop import StepResult, TrainState
from glad_core.training.recipe import Recipe
from pipelines.train import checkpoints
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.plan import TrainRequest, plan_job
from pipelines.train.spec import CHECKPOINT, METRICS

UPLOAD_SECONDS = 0.4


@pytest.fixture
def job(tmp_path: Path, tiny_bundle):
    request = TrainRequest("", "nut", str(tiny_bundle), "", {"steps": 10**6})
    return replace(plan_job(request, ["nut"], Storage(), name="nut", work=str(tmp_path / "work")))


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch):
    """What is reported. Uploads run as Ray Train runs them, and each takes `UPLOAD_SECONDS`."""
    made = []

    def report(summary, checkpoint=None, checkpoint_upload_mode=None, checkpoint_upload_fn=None, **options) -> None:
        def upload() -> None:
            time.sleep(UPLOAD_SECONDS)
            made.append((summary, checkpoint_upload_fn(checkpoint, f"checkpoint_{summary['step']}")))

        if checkpoint_upload_mode == CheckpointUploadMode.SYNC:
            upload()
        else:
            threading.Thread(target=upload).start()

    monkeypatch.setattr(ray.train, "report", report)
    return made


def step(number: int) -> StepResult:
    return StepResult(number, 0.5, {}, 1e-4, 2, 0.1, 0.0)


def make_state() -> TrainState:
    return TrainState.start(nn.Linear(16, 16), Recipe())


def wait_for(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_training_waits_for_the_copy_alone_and_the_copy_is_of_its_moment(job, reports) -> None:
    state = make_state()
    before = state.loss.weight.detach().clone()
    saving = Checkpoints(job, 0, 1)
    state.step = 3
    saving.save(state, [step(1), step(2), step(3)])
    assert saving.writing
    assert not saving.due(4)  # one at a time, so that memory holds one copy
    assert reports == []  # training goes on meanwhile, and changes the weights
    with torch.no_grad():
        state.loss.weight.zero_()
    wait_for(lambda: not saving.writing)
    wait_for(lambda: reports)
    ((summary, checkpoint),) = reports
    assert summary == {"step": 3, "loss": 0.5}
    saved = torch.load(f"{checkpoint.path}/{CHECKPOINT}", weights_only=True)
    assert saved["step"] == 3
    assert torch.equal(saved["weights"]["weight"], before)
    assert pq.read_table(f"{job.work}/{METRICS}")["step"].to_pylist() == [1, 2, 3]


def test_without_room_for_a_copy_training_waits_and_the_next_comes_later(job, reports, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "get_used_memory", lambda: 2**60)
    saving, state = Checkpoints(job, 0, 1), make_state()
    state.step = 1
    saving.save(state, [step(1)])
    assert len(reports) == 1
    assert saving.blocked >= UPLOAD_SECONDS
    assert saving.next - time.monotonic() > 0.9 * UPLOAD_SECONDS / checkpoints.COST


def test_checkpoints_come_by_time_and_the_last_step_always_has_one(job, reports) -> None:
    now = [100.0]
    saving = Checkpoints(replace(job, recipe=Recipe(steps=50)), 0, 1, clock=lambda: now[0])
    assert not saving.due(1)
    assert saving.due(50)
    now[0] += checkpoints.LEAST_SECONDS
    assert saving.due(2)
    saving.next = now[0] + 100  # as after a save that blocked training for five seconds
    assert not saving.due(3)


def test_leftovers_of_killed_writers_go_when_a_run_resumes(job, monkeypatch) -> None:
    for name in ("checkpoint_a", "checkpoint_b", "metrics"):
        (Path(job.work) / name).mkdir(parents=True)
    (Path(job.work) / "checkpoint_manager_snapshot.json").write_text("{}")
    state = make_state()
    torch.save(state.state_dict() | {"step": 7}, Path(job.work) / "checkpoint_b" / CHECKPOINT)
    reported = ray.train.Checkpoint(f"{job.work}/checkpoint_b", pafs.LocalFileSystem())
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: reported)
    checkpoints.resume(job, state, 1, torch.device("cpu"))
    assert state.step == 7
    assert (Path(job.work) / "checkpoint_a").exists()  # only the first worker cleans up
    checkpoints.resume(job, state, 0, torch.device("cpu"))
    assert sorted(path.name for path in Path(job.work).iterdir()) == [
        "checkpoint_b",
        "checkpoint_manager_snapshot.json",
        "metrics",
    ]
    assert not checkpoints.trained()
