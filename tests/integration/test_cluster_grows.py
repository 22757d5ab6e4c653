"""Machines that come and go while a job runs: lost, added by hand, brought by the autoscaler and sent away again."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from conftest import free_ports, photo
from test_faults import content, start, wait_for_commits

from cluster import session

pytestmark = pytest.mark.slow
IMAGES = 120  # enough that not all of them are with the first actor when it is stopped
ACTOR = "ray::MapWorker(MapBatches(GladActor"
LEAN = {"include_dashboard": False, "include_log_monitor": False}  # a head without programs that nobody needs here
FAKE_HEAD = "f" * 51 + "00000"  # the name Ray's fake machines expect of theirs


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    for index in range(IMAGES):
        path = photo(index % 40, root / f"{index:03d}.png")
        if index % 40 == 0:
            path.write_bytes(path.read_bytes()[:100])
    return root


@pytest.fixture
def ray_folder(monkeypatch):
    """A folder for a cluster's files; its name is short, since paths of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="g", ignore_cleanup_errors=True) as name:
        (Path(name) / "ray").mkdir()
        for variable, value in (session.QUIET | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": name}).items():
            monkeypatch.setenv(variable, value)
        yield Path(name)


def actors(top):
    """The processes below ``top`` that hold the model, by the process of their machine."""
    found = {}
    for process in top.children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline() and process.cmdline()[0].startswith(ACTOR):
                found.setdefault(process.ppid(), []).append(process)
    return found


def working(process):
    """Whether an actor runs a task: Ray writes it into the title of the process."""
    with suppress(psutil.Error):
        return process.cmdline()[0].endswith(".submit")
    return False


def until(true, seconds, log, driver=None):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert driver is None or driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found


def check(out, archive):
    """Every image is in the results or the errors, once."""
    found = content(out)
    assert {row["uri"] for row in found.values()} == {str(path) for path in archive.iterdir()}
    counts = json.loads((out / "run.json").read_text())["counts"]
    assert (counts["images"], counts["errors"]) == (IMAGES, IMAGES // 40)


def command(archive, bundle, out, address, *more):
    # Small batches, so that one actor cannot hold them all while it is stopped.
    words = ["score", archive, "--model", bundle, "--out", out, "--address", address, "--batch-size", 4, *more]
    return [str(word) for word in words]


def test_a_machine_added_takes_work_and_one_lost_loses_none(monkeypatch, tmp_path, archive, tiny_bundle, ray_folder):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # a lost machine is noticed in seconds
    out, log, here = tmp_path / "out", tmp_path / "log", psutil.Process()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | LEAN)
    driver = None
    try:
        first = cluster.add_node(num_cpus=1)
        driver = start(command(archive, tiny_bundle, out, cluster.address, "--actors", 2), log)
        wait_for_commits(out, 1, driver, log)
        ((machine, (slow,)),) = until(lambda: actors(here), 10, log, driver).items()
        slow.send_signal(signal.SIGSTOP)  # what is left is still to do when the second machine is there
        assert not (out / "run.json").exists(), "too late: the job was over"

        cluster.add_node(num_cpus=1)
        until(lambda: any(working(of[0]) for place, of in actors(here).items() if place != machine), 60, log, driver)
        assert slow.is_running()
        cluster.remove_node(first, allow_graceful=False)
        assert driver.wait(120) == 0, log.read_text()
    finally:
        if driver is not None:
            driver.kill()
        cluster.shutdown()
    check(out, archive)


@pytest.fixture
def growing(ray_folder, monkeypatch):
    """A head without CPUs, whose autoscaler may add two machines of one CPU; its process and address."""
    ip = ray.util.get_node_ip_address()
    port, metrics, agent, client = free_ports(4)
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD,
        "gcs_address": f"{ip}:{port}",
    }
    worker = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2}
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    config = {"cluster_name": "glad", "max_workers": 2, "idle_timeout_minutes": 0.05, "provider": provider}
    config |= {"head_node_type": "ray.head.default", "available_node_types": {"ray.head.default": head, "cpu": worker}}
    config |= {f"{name}_commands": [] for name in ("setup", "head_setup", "worker_setup", "initialization")}
    config |= {f"{name}_start_ray_commands": [] for name in ("head", "worker")}
    config |= {"auth": {}, "file_mounts": {}, "cluster_synced_files": []}
    (ray_folder / "cluster.yaml").write_text(json.dumps(config))
    # The clusters of other tests leave tokens of theirs in the environment.
    (ray_folder / "token").write_text("a-token-that-nobody-guesses-0123456789")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_folder / "token"))
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(metrics),
    }
    options = {
        "port": port,
        "num-cpus": 0,
        "include-dashboard": "false",
        "include-log-monitor": "false",
        "object-store-memory": 10**8,
        "temp-dir": ray_folder / "r",
        "autoscaling-config": ray_folder / "cluster.yaml",
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    with (ray_folder / "log").open("wb") as output:
        head = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block", *words],
            env=environment,
            stdout=output,
            stderr=output,
        )
    top = psutil.Process(head.pid)
    try:
        until(lambda: "Ray runtime started" in (ray_folder / "log").read_text(), 60, ray_folder / "log", head)
        yield top, f"{ip}:{port}"
    finally:
        processes = [*top.children(recursive=True), top]
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=20)
        head.wait()


def machines(top):
    """How many machines there are besides the head."""
    raylets = 0
    for process in top.children(recursive=True):
        with suppress(psutil.Error):  # ended in the meantime
            raylets += process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE
    return raylets - 1


def test_the_autoscaler_brings_machines_for_a_backlog_and_takes_them_back(tmp_path, archive, tiny_bundle, growing):
    top, address = growing
    out, log = tmp_path / "out", tmp_path / "log"
    assert machines(top) == 0
    driver = start(command(archive, tiny_bundle, out, address), log)
    try:
        wait_for_commits(out, 1, driver, log)
        machine, (slow,) = next(iter(until(lambda: actors(top), 60, log, driver).items()))
        slow.send_signal(signal.SIGSTOP)  # a backlog, however fast this computer is
        assert not (out / "run.json").exists(), "too late: the job was over"
        until(lambda: any(working(of[0]) for place, of in actors(top).items() if place != machine), 300, log, driver)
        assert machines(top) == 2
        slow.send_signal(signal.SIGCONT)
        assert driver.wait(300) == 0, log.read_text()
    finally:
        driver.kill()
    assert "1 actor with 0.75 CPU each, more as the cluster grows" in " ".join(log.read_text().split())
    check(out, archive)
    until(lambda: machines(top) == 0, 120, log)
    assert not actors(top)
