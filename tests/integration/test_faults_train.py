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

pytestmark = pytest.mark.slow
STEPS = 300  # some three times as long as a checkpoint takes to come


def command(dataset, base, out):
    options = ["--category", "part", "--base", base, "--out", out, "--steps", STEPS, "--batch-size", 2]
    return ["train", str(dataset), *map(str, options), "--learning-rate", "1e-4"]


def train(*arguments):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output


def weights(folder):
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def kill_a_training_worker(after):
    """SIGKILL to the first Ray Train worker seen, so many seconds later: by then it has its work."""
    while True:
        for process in psutil.Process().children(recursive=True):  # of this Ray, not of the dying driver's
            with suppress(psutil.Error):  # ended in the meantime
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    time.sleep(after)
                    process.kill()
                    return
        time.sleep(0.05)


def test_a_run_that_loses_its_driver_and_a_worker_ends_bitwise_as_if_nothing_had_happened(
    tmp_path, dataset, tiny_bundle, ray_session
):
    arguments = command(dataset, tiny_bundle, tmp_path / "killed")
    log = tmp_path / "log"
    driver = start(arguments, log)
    work = tmp_path / "killed.train"
    while not list(work.glob("checkpoint_*")):
        assert driver.poll() is None, log.read_text()
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "killed").exists()
    assert not list(work.glob("checkpoint_*/final.safetensors"))

    killer = threading.Thread(target=kill_a_training_worker, args=(5,), daemon=True)
    killer.start()
    train(*arguments)
    killer.join(1)
    assert not killer.is_alive()
    assert not work.exists()

    description = verify(tmp_path / "killed")
    assert description.category == "part"
    assert description.settings["threshold"] > 0
    assert description.settings["delta"] > 0
    assert description.provenance["base"] == read_description(tiny_bundle).model_id
    train(*command(dataset, tiny_bundle, tmp_path / "whole"))
    expected, base = weights(tmp_path / "whole"), weights(tiny_bundle)
    assert any((expected[name] != base[name]).any() for name in base)
    for name, weight in weights(tmp_path / "killed").items():
        assert (weight == expected[name]).all(), name

    rows, whole = (pq.read_table(tmp_path / f"{name}.training.parquet").to_pylist() for name in ("killed", "whole"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    bands = {"loss_t0", "loss_t750", "loss_normal", "loss_abnormal", "images_per_second", "data_wait_share"}
    assert bands <= set(rows[0])
    assert list((tmp_path / "killed.tensorboard").glob("events.out*"))
