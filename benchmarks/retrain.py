"""Retraining many categories on a cluster: CPUs of the data, cost of checkpoints, lost workers and machines.

    python benchmarks/retrain.py [--json] [--categories 40]

The machines are logical: nodes of one Ray cluster on this machine, with the CPUs and GPUs that they say they have.

- ``stream_cpus_min``: CPUs that the makers of a training's batches have, if eight trainings run on 8 machines of 8 CPUs
  and a GPU, on 8 of 7 and one, and on one of 64 and 8: the smallest. All eight trainings must find their place at once,
  and a task of a survey beside them.
- ``checkpoint_share``: share of the time that a training of 40 MB waits for its checkpoints if storage takes .8 MB/s,
  which is to it what 200 MB/s is to 10 GB: 50 seconds each.
- ``retrain_40_ok``: forty categories on eight logical GPUs all reach the registry, although two training workers are
  killed -9 and a machine with a third is lost. The real command, Ray Train and trainings; only the device is a CPU.
- ``lead_mb_per_category``: memory that leading takes for each category at a time, on the machine of the command.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from conftest import make_tiny_bundle

from cluster import session
from cluster.storage import Storage
from glad_core.training.loop import StepResult, TrainState
from glad_core.training.recipe import Recipe
from pipelines.train import retrain as job
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.plan import TrainRequest, plan_job, with_resources
from pipelines.train.survey import DATA_CPUS

GPUS = 8
SHAPES = {"8 of 8 CPUs, 1 GPU": [(8, 1)] * 8, "8 of 7 CPUs, 1 GPU": [(7, 1)] * 8, "1 of 64 CPUs, 8 GPUs": [(64, 8)]}
MACHINE_MEMORY = 64 * 10**9  # that a logical machine declares
STATE_MB, MB_PER_SECOND, TRAIN_SECONDS = 40, 0.8, 240


@contextmanager
def logical_cluster(machines: list[tuple[int, int]]) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster with a head that has no CPUs and no memory to give, and these (CPUs, GPUs); its machines beside it."""
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="g", ignore_cleanup_errors=True) as name:
        (Path(name) / "ray").mkdir()
        os.environ |= {"RAY_TMPDIR": name, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        head = {"num_cpus": 0, "memory": 0, "include_dashboard": False, "object_store_memory": 2**28}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        store = {"memory": MACHINE_MEMORY, "object_store_memory": 2**27}
        nodes = [cluster.add_node(num_cpus=cpus, num_gpus=gpus, wait=False, **store) for cpus, gpus in machines]
        cluster.wait_for_nodes(300)
        try:
            yield cluster, nodes
        finally:
            session.disconnect()
            ray.shutdown()
            cluster.shutdown()


def stream_cpus() -> float:
    """The smallest number of CPUs of a stream over `SHAPES`, each with a training on every GPU."""
    return min(_stream_cpus(machines) for machines in SHAPES.values())


def _stream_cpus(machines: list[tuple[int, int]]) -> float:
    import ray
    from ray.util.placement_group import placement_group

    with logical_cluster(machines) as (cluster, _):
        session.connect(cluster.address)
        request = TrainRequest("", "all", "small", "", {}, address=cluster.address)
        training = with_resources(plan_job(request, ["a"], Storage(), name="a", work="/nowhere"), request, GPUS)
        groups = [placement_group([training.worker_resources]) for _ in range(GPUS)]
        ray.get([group.ready() for group in groups], timeout=300)
        ray.get(ray.remote(num_cpus=DATA_CPUS)(lambda: None).remote(), timeout=300)
        return min(training.cpus - 1, training.makers)  # one is the worker's own


class SlowFiles:
    """Local files, written at `MB_PER_SECOND`: as much of a pyarrow file system as writing a checkpoint needs."""

    def create_dir(self, path: str) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def open_output_stream(self, path: str) -> Iterator[SlowFiles]:
        with open(path, "wb") as self.file:
            yield self

    def write(self, data: Any) -> int:
        time.sleep(len(data) / MB_PER_SECOND / 1e6)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class SlowStorage(Storage):
    """Where `SlowFiles` are."""

    def resolve(self, uri: str) -> tuple[Any, str]:
        return SlowFiles(), uri


def checkpoint_share(work: Path) -> dict[str, float]:
    """Share of a training that waits for checkpoints. Uploads run in a thread, as Ray Train has them."""
    import ray.train

    def report(summary: Any, checkpoint_upload_mode: Any, checkpoint_upload_fn: Any, **_: Any) -> None:
        assert checkpoint_upload_mode == ray.train.CheckpointUploadMode.ASYNC, "no memory for a copy"
        threading.Thread(target=checkpoint_upload_fn, args=(None, f"checkpoint_{summary['step']}"), daemon=True).start()
        checkpoints.append(summary["step"])

    checkpoints: list[int] = []
    ray.train.report = report
    request = TrainRequest("", "a", "small", "", {"steps": 10**9})
    training = plan_job(request, ["a"], Storage(), name="a", work=str(work / "slow"))
    side = int((STATE_MB * 1e6 / 12) ** 0.5)  # weights and two moments of four bytes each
    state = TrainState.start(torch.nn.Linear(side, side, bias=False), Recipe())
    saving = Checkpoints(replace(training, storage=SlowStorage()), 0, 1)
    started = time.monotonic()
    images = torch.randn(16, side)
    while time.monotonic() - started < TRAIN_SECONDS:
        state.loss(images).square().mean().backward()
        state.optimizers[0].step()
        state.step += 1
        if saving.due(state.step):
            saving.save(state, [StepResult(state.step, 0.0, {}, 0.0, 16, 1.0, 0.0)])
    seconds = time.monotonic() - started
    return {
        "checkpoint_share": saving.blocked / seconds,
        "checkpoints": len(checkpoints),
        "checkpoint_every_seconds": round(seconds / len(checkpoints)),
    }


def draw(root: Path, categories: int) -> Path:
    """Small noisy pictures of as many categories."""
    rng = np.random.default_rng(0)
    for category in range(categories):
        good = root / f"part{category:02d}" / "train" / "good"
        good.mkdir(parents=True)
        for number in range(6):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(good / f"{number}.png")
    return root


def trainers(machine: Any) -> list[psutil.Process]:
    """The training workers on a logical machine: children of its raylet."""
    raylet = machine.all_processes["raylet"][0].process.pid
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(raylet).children():
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def disturb(cluster: Any, machines: list[Any], current: Callable[[], int], running: Callable[[], bool]) -> list[str]:
    """Kill two training workers, then take a machine away from a third; returns what was done."""
    done: list[str] = []
    while running() and len(done) < 3:
        time.sleep(1)
        at_work = [machine for machine in machines if trainers(machine)]
        if current() < 2 * len(done) + 1 or not at_work:  # the first categories are through
            continue
        machine = random.choice(at_work)
        if len(done) < 2:
            trainers(machine)[0].kill()
            done.append("worker")
        else:
            machines.remove(machine)
            cluster.remove_node(machine, allow_graceful=False)
            done.append("machine")
        Console(stderr=True).print(f"lost: a {done[-1]}, {current()} categories are through")
    return done


def led_megabytes(machine: psutil.Process) -> float:
    """Memory of this process and of what the head runs for it, shares of shared pages counted once."""
    own = psutil.Process().memory_full_info().pss
    for process in machine.children():
        with suppress(psutil.Error):
            if process.cmdline()[0].startswith("ray::"):
                own += process.memory_full_info().pss
    return own / 1e6


def forty(work: Path, categories: int) -> dict[str, Any]:
    """`glad retrain` of many categories on eight logical GPUs, disturbed; the model is a tiny one of random weights."""
    data, bundle, home = draw(work / "data", categories), make_tiny_bundle(work / "tiny"), work / "registry"
    recipe = {"steps": 2, "batch_size": 2}
    request = TrainRequest(str(data), "all", str(bundle), str(home), recipe)
    # The plan is that of eight GPUs; only the networks run on this machine's CPUs.
    job.with_resources = lambda *arguments: replace(with_resources(*arguments), device="cpu")  # type: ignore[assignment]
    outcome: list[bool] = []
    memory: list[float] = []
    with logical_cluster([(8, 1)] * GPUS) as (cluster, machines):
        head = psutil.Process(cluster.head_node.all_processes["raylet"][0].process.pid)
        before = led_megabytes(head)

        def run() -> None:
            console = Console(file=(work / "log").open("w"), width=160)
            settings = job.RetrainRequest(replace(request, address=cluster.address), promote="always")
            try:
                outcome.append(job.retrain(settings, console))
            finally:
                outcome.append(False)

        def watch() -> None:
            while not outcome:
                time.sleep(10)
                with suppress(psutil.Error):  # the cluster is gone
                    memory.append(led_megabytes(head))

        started = time.monotonic()
        thread = threading.Thread(target=run)
        thread.start()
        threading.Thread(target=watch, daemon=True).start()
        lost = disturb(cluster, machines, lambda: len(list(home.glob("*/current.json"))), lambda: not outcome)
        thread.join()
        seconds = time.monotonic() - started
    done = len(list(home.glob("*/current.json")))
    succeeded = outcome[0] and done == categories and lost == ["worker", "worker", "machine"]
    if not succeeded:
        print((work / "log").read_text()[-5000:], file=sys.stderr)
    led = (max(memory) - before) / min(GPUS, categories)
    return {
        f"retrain_{categories}_ok": succeeded,
        "categories": done,
        "lost": lost,
        "retrain_seconds": round(seconds),
        "lead_mb_per_category": round(led, 1),
    }


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    categories: Annotated[int, typer.Option(help="categories to retrain")] = 40,
) -> None:
    """Measure and print."""
    work = Path(tempfile.mkdtemp(prefix="glad-bench-"))
    figures: dict[str, Any] = {}
    try:
        figures["stream_cpus_min"] = stream_cpus()
        figures |= forty(work, categories)
        figures |= checkpoint_share(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:28} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
