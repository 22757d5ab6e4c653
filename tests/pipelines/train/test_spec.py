from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage
from pipelines.train.good_images import GoodImage
from pipelines.train.plan import TrainRequest, plan_job
from pipelines.train.spec import TrainJob, clear_work
from pipelines.train.survey import Survey

STORAGE = Storage()
SURVEYED = Survey([GoodImage("/a", "nut")], [GoodImage("/b", "nut")], [], [], "fingerprint", [])


@pytest.fixture
def job(tiny_bundle) -> TrainJob:
    request = TrainRequest("data", "nut", str(tiny_bundle), "out", {"steps": 3, "batch_size": 2})
    return plan_job(request, ["nut"], STORAGE, name="nut", work="/work")


def test_a_run_is_the_same_if_nothing_that_decides_its_bundle_changes(job: TrainJob) -> None:
    run_id = job.run_id(SURVEYED)
    elsewhere = replace(job, name="other", work="/elsewhere", workers=4, cpus=8.0, device="cuda", gpus=1.0)
    assert elsewhere.run_id(SURVEYED) == run_id
    changes = [
        {"part": "vae"},
        {"categories": ["nut", "bolt"]},
        {"textures": "/textures"},
        {"target_fpr": 0.01},
        {"recipe": job.recipe.model_copy(update={"seed": 1})},
    ]
    run_ids = {replace(job, **change).run_id(SURVEYED) for change in changes}
    run_ids.add(job.run_id(replace(SURVEYED, fingerprint="other pixels")))
    assert len(run_ids | {run_id}) == len(changes) + 2


def test_a_part_of_a_core_is_worth_a_thread(job: TrainJob) -> None:
    threads = {cpus: replace(job, cpus=cpus).threads for cpus in (0.5, 0.75, 1.5, 3.5, 8.0)}
    assert threads == {0.5: 1, 0.75: 1, 1.5: 2, 3.5: 4, 8.0: 8}
    assert replace(job, cpus=5.0, gpus=1.0).threads == 1  # the others make its batches


def test_a_finished_run_leaves_its_metrics_and_nothing_else(tmp_path: Path) -> None:
    work = tmp_path / "out.train"
    for folder in ("metrics", "tensorboard", "checkpoint_1"):
        (work / folder).mkdir(parents=True)
    (work / "tensorboard/events").write_text("events")
    for start in (3, 1):
        pq.write_table(pa.table({"step": [start + 1, start]}), work / f"metrics/part-{start}.parquet")
    clear_work(STORAGE, str(work), str(tmp_path / "out"))
    assert pq.read_table(tmp_path / "out.training.parquet")["step"].to_pylist() == [1, 2, 3, 4]
    assert (tmp_path / "out.tensorboard/events").read_text() == "events"
    assert not work.exists()
