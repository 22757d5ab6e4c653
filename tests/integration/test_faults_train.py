"""Training that loses its driver and a worker goes on from its last checkpoint."""

import signal
import threading
import time
from contextlib import suppress

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from test_faults import start
from typer.testing import CliRunner

from glad_core.bundle.glad_json import read_description, verify
from pipelines.cli.main import app
from pipelines.train import job

pytestmark = pytest.mark.slow
STEPS = 60  # some ten times as long as a checkpoint takes to come, with these:
# A checkpoint every few steps. Workers get the function as it is here, since they cannot import it.
EAGER = """
from cluster.quick_imports import quick_imports
from pipelines.train import job

work = job._work

def eager(config):
    with quick_imports("transformers", "peft", "scipy"):
        from pipelines.train import checkpoints
    checkpoints.LEAST_SECONDS = 0.2
    work(config)

job._work = eager
"""


def command(dataset, base, out):
    options = ["--category", "part", "--base", base, "--out", out, "--steps", STEPS, "--batch-size", 2]
    return ["train", str(dataset), *map(str, options), "--learning-rate", "1e-4"]


def train(*arguments):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output


def weights(folder):
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def eager(monkeypatch):
    """Trainings of this process have checkpoints every few steps."""
    monkeypatch.setattr(job, "_work", job._work)  # so that it comes back
    exec(EAGER, {"__name__": "__main__"})


def kill_a_training_worker(when):
    """A thread that sends SIGKILL to the Ray Train workers of this process, once ``when`` says so."""

    def kill():
        while not when():
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):  # of this Ray, not of the dying driver's
            with suppress(psutil.Error):  # ended in the meantime
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process)

    killed = []
    threading.Thread(target=kill, daemon=True).start()
    return killed


def test_a_run_that_loses_its_driver_and_a_worker_ends_bitwise_as_if_nothing_had_happened(
    tmp_path, dataset, preset_bundle, ray_session, eager
):
    arguments = command(dataset, preset_bundle, tmp_path / "killed")
    log = tmp_path / "log"
    driver = start(arguments, log, before=EAGER)
    work = tmp_path / "killed.train"
    while not (work / "checkpoint_manager_snapshot.json").exists():
        assert driver.poll() is None, log.read_text()
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "killed").exists()
    assert not list(work.glob("checkpoint_*/final.safetensors"))

    kept = {path.name for path in work.glob("checkpoint_*")}
    killed = kill_a_training_worker(lambda: {path.name for path in work.glob("checkpoint_*")} - kept)
    train(*arguments)
    assert len(killed) == 1
    assert not work.exists()

    description = verify(tmp_path / "killed")
    assert description.category == "part"
    assert description.settings["threshold"] > 0
    assert description.settings["delta"] > 0
    assert description.provenance["base"] == read_description(preset_bundle).model_id
    train(*command(dataset, preset_bundle, tmp_path / "whole"))
    expected, base = weights(tmp_path / "whole"), weights(preset_bundle)
    assert any((expected[name] != base[name]).any() for name in base)
    for name, weight in weights(tmp_path / "killed").items():
        assert (weight == expected[name]).all(), name

    rows, whole = (pq.read_table(tmp_path / f"{name}.training.parquet").to_pylist() for name in ("killed", "whole"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    bands = {"loss_t0", "loss_t750", "loss_normal", "loss_abnormal", "images_per_second", "data_wait_share"}
    assert bands <= set(rows[0])
    assert list((tmp_path / "killed.tensorboard").glob("events.out*"))
