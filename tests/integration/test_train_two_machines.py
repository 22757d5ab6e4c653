"""Two workers of one training on two machines: one is killed, and the result is that of one process, undisturbed."""

from contextlib import suppress

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from test_cluster_grows import ray_folder, until  # noqa: F401  (a fixture)
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


def test_two_workers_of_which_one_is_lost_train_what_one_process_does(tmp_path, dataset, tiny_bundle, ray_folder):  # noqa: F811
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "memory": 0, "include_dashboard": False}  # such a head gets no work of ours
    cluster = Cluster(initialize_head=True, head_node_args=head)
    machines = [cluster.add_node(num_cpus=2) for _ in range(2)]  # room for one worker each

    words = ["train", dataset, "--category", "part", "--base", tiny_bundle, "--out", tmp_path / "out", "--workers", 2]
    words += ["--steps", STEPS, "--batch-size", 2, "--learning-rate", "1e-4", "--address", cluster.address]
    log = tmp_path / "log"
    try:
        driver = start([*map(str, words)], log, before=EAGER)
        snapshot = tmp_path / "out.train/checkpoint_manager_snapshot.json"
        until(snapshot.exists, 600, log, driver)
        placed = workers(machines)
        assert sorted(placed) == [0, 1]
        placed[1].kill()
        assert driver.wait(600) == 0, log.read_text()
    finally:
        cluster.shutdown()
    expected, losses = as_glad_train(dataset, tiny_bundle, STEPS)
    steps = pq.read_table(tmp_path / "out.training.parquet")
    assert steps["step"].to_pylist() == list(range(1, STEPS + 1))
    assert steps["loss"].to_pylist() == pytest.approx(losses, rel=1e-3)
    found, base = (
        load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in (tmp_path / "out", tiny_bundle)
    )
    # AdamW's first steps are of size lr however small the gradient, so rounding reverses some of them.
    change = np.mean([float((expected[name] - base[name]).abs().mean()) for name in base])
    difference = np.mean([float((expected[name] - found[name]).abs().mean()) for name in base])
    assert difference < 0.05 * change
