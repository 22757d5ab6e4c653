import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description, update_settings
from glad_core.bundle.settings import Settings
from pipelines.models import registry
from pipelines.train.good_images import GoodImage
from pipelines.train.plan import TrainRequest, plan_job
from pipelines.train.retrain import RetrainRequest, find_earlier, parallel_jobs, publish_and_promote
from pipelines.train.spec import Outcome, TrainJob
from pipelines.train.survey import Survey

STORAGE = Storage()


@pytest.fixture
def trained(tmp_path: Path, tiny_bundle):
    """A function that makes the n-th finished training run: the arguments that `finish` calls ``deliver`` with."""
    rng = np.random.default_rng(0)
    held_out = []
    for number in range(4):
        path = tmp_path / "good" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        held_out.append(GoodImage(str(path), "bolt"))

    def make(n: int) -> tuple[Path, TrainJob, Survey]:
        bundle = tmp_path / f"bundle{n}"
        shutil.copytree(tiny_bundle, bundle)
        before = Settings.parse(read_description(bundle).settings, "test")
        update_settings(bundle, before.model_copy(update={"threshold": float(n + 1)}), {})
        work = tmp_path / "registry" / ".work" / "bolt" / str(n)
        (work / "metrics").mkdir(parents=True)
        pq.write_table(pa.table({"step": [2, 1], "loss": [0.1, 0.2]}), work / "metrics/part-1.parquet")
        request = TrainRequest("", "bolt", str(tiny_bundle), "", {"seed": n})
        job = replace(plan_job(request, ["bolt"], STORAGE, name="bolt", work=str(work)), images=held_out)
        surveyed = Survey(held_out, held_out, [], [], f"data{n}", [(32, 32)])
        update_settings(
            bundle, Settings.parse(read_description(bundle).settings, "test"), {"run": job.run_id(surveyed)}
        )
        return bundle, job, surveyed

    return make


def deliver(trained_run, tmp_path: Path, promote: str = "gate", margin: float = 0.02) -> Outcome:
    home = str(tmp_path / "registry")
    return publish_and_promote(*trained_run, storage=STORAGE, home=home, promote=promote, margin=margin)


def test_the_gate_decides_what_goes_live(tmp_path, trained) -> None:
    home = str(tmp_path / "registry")
    first = deliver(trained(0), tmp_path)
    assert first.words == "promoted"
    assert registry.current(home, "bolt", STORAGE).version == first.model_id
    assert pq.read_table(f"{home}/bolt/{first.model_id}.training.parquet")["step"].to_pylist() == [1, 2]
    assert not Path(home, ".work", "bolt").exists()

    kept = deliver(trained(1), tmp_path, margin=-1)  # nothing is better by a whole AUROC
    assert kept.words.startswith(f"kept {first.model_id}: AUROC")
    assert registry.current(home, "bolt", STORAGE).version == first.model_id
    second = deliver(trained(2), tmp_path, margin=1)
    assert second.words.startswith("promoted: AUROC")
    assert registry.current(home, "bolt", STORAGE).earlier == [first.model_id]
    never = deliver(trained(3), tmp_path, promote="never")
    assert "not promoted" in never.words
    assert registry.current(home, "bolt", STORAGE).version == second.model_id
    assert deliver(trained(4), tmp_path, promote="always").words == "promoted"
    assert len(registry.versions(home, "bolt", STORAGE)) == 5


def test_the_same_run_is_not_repeated_and_another_has_a_folder_of_its_own(tmp_path, trained) -> None:
    home = str(tmp_path / "registry")
    bundle, job, surveyed = trained(0)
    fresh = find_earlier(job, surveyed, storage=STORAGE, home=home)
    assert fresh.work.startswith(f"{home}/.work/bolt/")
    outcome = deliver((bundle, job, surveyed), tmp_path)
    assert find_earlier(job, surveyed, storage=STORAGE, home=home) == Outcome("up to date", outcome.model_id)
    grown = replace(surveyed, fingerprint="more images")
    assert find_earlier(job, grown, storage=STORAGE, home=home).work != fresh.work
    stricter = find_earlier(replace(job, target_fpr=0.01), surveyed, storage=STORAGE, home=home)
    assert isinstance(stricter, TrainJob)  # another threshold is another bundle


@pytest.mark.parametrize(
    ("available", "workers", "max_parallel", "expected"),
    [
        ({"CPU": 2}, 1, None, 3),
        ({"CPU": 2}, 1, 8, 3),  # more than fit: all would wait for each other's CPUs
        ({"CPU": 2}, 1, 1, 1),
        ({"CPU": 8}, 2, None, 7),
        ({"CPU": 1}, 4, None, 1),
        ({"CPU": 32, "GPU": 4}, 2, None, 2),
    ],
)
def test_no_more_categories_at_a_time_than_fit(available, workers, max_parallel, expected) -> None:
    request = RetrainRequest(TrainRequest("", "all", "small", "", {}, workers=workers), max_parallel=max_parallel)
    assert parallel_jobs(request, available, 30) == expected
