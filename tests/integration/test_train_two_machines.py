"""Two workers of one training on two machines: one is killed, and the result is that of an undisturbed run.

That one is nearly what one process trains, whose rounding is another.
"""

from contextlib import suppress

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from test_cluster_grows import LEAN, ray_folder, until  # noqa: F401  (the second is a fixture)
from test_faults import start
from test_faults_train import EAGER
from tiny_training import as_glad_train

pytestmark = pytest.mark.slow
STEPS = 40


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


def test_a_lost_worker_of_two_on_two_machines_changes_nothing(tmp_path, dataset, preset_bundle, ray_folder):  # noqa: F811
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "memory": 0} | LEAN  # such a head gets no work of ours
    cluster = Cluster(initialize_head=True, head_node_args=head)
    machines = [cluster.add_node(num_cpus=2) for _ in range(2)]  # room for one worker each

    def train(name):
        words = ["train", dataset, "--category", "part", "--base", preset_bundle, "--out", tmp_path / name]
        words += ["--steps", STEPS, "--batch-size", 2, "--learning-rate", "1e-4", "--workers", 2]
        return start([*map(str, words), "--address", cluster.address], tmp_path / f"{name}.log", before=EAGER)

    try:
        driver = train("disturbed")
        log = tmp_path / "disturbed.log"
        snapshot = tmp_path / "disturbed.train/checkpoint_manager_snapshot.json"
        until(snapshot.exists, 600, log, driver)
        placed = workers(machines)
        assert sorted(placed) == [0, 1]
        placed[1].kill()
        assert driver.wait(600) == 0, log.read_text()
        driver = train("whole")
        assert driver.wait(600) == 0, (tmp_path / "whole.log").read_text()
    finally:
        cluster.shutdown()
    places = (tmp_path / "disturbed", tmp_path / "whole", preset_bundle)
    disturbed, whole, base = (load_file(at / "unet/diffusion_pytorch_model.safetensors") for at in places)
    assert all((disturbed[name] == whole[name]).all() for name in whole)
    steps, whole_steps = (pq.read_table(tmp_path / f"{name}.training.parquet") for name in ("disturbed", "whole"))
    assert steps["step"].to_pylist() == list(range(1, STEPS + 1))
    assert steps["loss"].to_pylist() == whole_steps["loss"].to_pylist()

    expected, losses = as_glad_train(dataset, preset_bundle, STEPS)
    assert steps["loss"].to_pylist() == pytest.approx(losses, rel=1e-3)
    # AdamW's first steps are of size lr however small the gradient, so rounding reverses some of them.
    change = np.mean([float((expected[name] - base[name]).abs().mean()) for name in base])
    difference = np.mean([float((expected[name] - whole[name]).abs().mean()) for name in base])
    assert difference < 0.05 * change
