"""Two workers of one training on two machines: one is killed, then the driver, and the same command ends the training.

Its result is that of an undisturbed run, which is nearly what one process trains, whose rounding is another.
"""

from contextlib import suppress

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from test_cluster_grows import LEAN, ray_folder, until  # noqa: F401  (the second is a fixture)
from test_faults import start
from tiny_training import EAGER, as_glad_train

from glad_core.bundle.glad_json import read_description, verify

pytestmark = pytest.mark.slow
STEPS = 60  # more than twice as long as a checkpoint takes to come


def workers(machines):
    """The training workers by machine."""
    found = {}
    for number, machine in enumerate(machines):
        with suppress(psutil.Error):
            for process in psutil.Process(machine.all_processes["raylet"][0].process.pid).children():
                with suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        found[number] = process
    return found


def checkpoints(work):
    return {path.name for path in work.glob("checkpoint_*")}


def test_a_lost_worker_and_a_lost_driver_change_nothing(tmp_path, dataset, preset_bundle, ray_folder):  # noqa: F811
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "memory": 0} | LEAN  # such a head gets no work of ours
    cluster = Cluster(initialize_head=True, head_node_args=head)
    machines = [cluster.add_node(num_cpus=2) for _ in range(2)]  # room for one worker each

    def train(name):
        words = ["train", dataset, "--category", "part", "--base", preset_bundle, "--out", tmp_path / name]
        words += ["--steps", STEPS, "--batch-size", 2, "--learning-rate", "1e-4", "--workers", 2]
        return start([*map(str, words), "--address", cluster.address], tmp_path / f"{name}.log", before=EAGER)

    out, log, work = tmp_path / "disturbed", tmp_path / "disturbed.log", tmp_path / "disturbed.train"
    driver = train("disturbed")
    try:
        until((work / "checkpoint_manager_snapshot.json").exists, 600, log, driver)
        placed = workers(machines)
        assert sorted(placed) == [0, 1]
        placed[1].kill()
        until(lambda: workers(machines).get(1, placed[1]) != placed[1], 600, log, driver)
        kept = checkpoints(work)
        until(lambda: checkpoints(work) - kept, 600, log, driver)
        driver.kill()
        driver.wait()
        assert not out.exists()
        assert not list(work.glob("checkpoint_*/final.safetensors")), "too late: it was trained"
        for name in ("disturbed", "whole"):
            driver = train(name)
            assert driver.wait(600) == 0, (tmp_path / f"{name}.log").read_text()
        assert not work.exists()
    finally:
        driver.kill()
        cluster.shutdown()
    description = verify(out)
    assert description.category == "part"
    assert description.settings["threshold"] > 0
    assert description.settings["delta"] > 0
    assert description.provenance["base"] == read_description(preset_bundle).model_id
    places = (out, tmp_path / "whole", preset_bundle)
    disturbed, whole, base = (load_file(at / "unet/diffusion_pytorch_model.safetensors") for at in places)
    assert all((disturbed[name] == whole[name]).all() for name in whole)
    steps, whole_steps = (pq.read_table(tmp_path / f"{name}.training.parquet") for name in ("disturbed", "whole"))
    assert steps["step"].to_pylist() == list(range(1, STEPS + 1))
    assert steps["loss"].to_pylist() == whole_steps["loss"].to_pylist()
    bands = {"loss_t0", "loss_t750", "loss_normal", "loss_abnormal", "images_per_second", "data_wait_share"}
    assert bands <= set(steps.column_names)
    assert list((tmp_path / "disturbed.tensorboard").glob("events.out*"))

    expected, losses = as_glad_train(dataset, preset_bundle, STEPS)
    assert steps["loss"].to_pylist() == pytest.approx(losses, rel=1e-3)
    # AdamW's first steps are of size lr however small the gradient, so rounding reverses some of them.
    change = np.mean([float((expected[name] - base[name]).abs().mean()) for name in base])
    difference = np.mean([float((expected[name] - whole[name]).abs().mean()) for name in base])
    assert difference < 0.05 * change
