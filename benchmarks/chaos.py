"""What the results hold after twenty disturbances of one job.

    python benchmarks/chaos.py [--json] [--images 2000] [--kills 20]

Archive and results are on a real S3 server; the cluster is a head and two worker nodes on this machine. At random
moments, in turn: an actor is killed (kill -9), the driver, a node; a second driver starts beside the first; the driver
is stopped (SIGSTOP), another takes over, and the stopped one goes on at the very end, when the run is complete; the
credentials of the driver expire, so that the server refuses all its requests. After a driver's end the same command is
given again; after a node's a new node is added. At the end the results must hold every image once, with exactly the
content of an undisturbed run (one image in flight at a time, so that not even rounding differs).
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from conftest import make_bucket, make_tiny_bundle, serve_s3
from test_faults_s3 import unreliable

from cluster.storage import Storage

TURNS = ("actor", "driver", "node", "twin", "zombie", "credentials")
NODE_CPUS = 4  # as Ray counts them: stopped drivers keep theirs
ARCHIVE, UNDISTURBED, DISTURBED = "s3://photos/archive", "s3://verdicts/undisturbed", "s3://verdicts/disturbed"


def fill(storage: Storage, images: int) -> None:
    """Write small smooth pictures; one in fifty is broken."""
    rng = np.random.default_rng(0)
    for index in range(images):
        stream = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(stream, "PNG")
        data = stream.getvalue()
        storage.write(f"{ARCHIVE}/{index:05d}.png", data[: len(data) // 2] if index % 50 == 0 else data)


@dataclass
class Job:
    """The disturbed job: its command, its drivers at work and those that were stopped, and the cluster's workers."""

    command: list[str]
    log: Path
    cluster: Any
    nodes: list[Any]
    endpoint: str
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    stopped: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, endpoint: str | None = None) -> None:
        """Give the command, in a process of its own."""
        with self.log.open("ab") as output:
            environment = os.environ | {"AWS_ENDPOINT_URL": endpoint or self.endpoint}
            self.drivers.append(subprocess.Popen(self.command, stdout=output, stderr=output, env=environment))

    def finished(self, seconds: float) -> bool:
        """Whether every driver ends well within that time."""
        deadline = time.monotonic() + seconds
        while self.drivers and time.monotonic() < deadline:
            for driver in [driver for driver in self.drivers if driver.poll() is not None]:
                assert driver.returncode == 0, self.log.read_text()[-2000:]
                self.drivers.remove(driver)
            time.sleep(0.1)
        return not self.drivers

    def disturb(self, what: str) -> bool:
        """Do it; returns whether it could be done."""
        if what == "actor":
            return kill_actor()
        if what == "node":
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=NODE_CPUS))
        if what == "driver":
            self.end_drivers()
            self.start()
        if what == "twin":
            self.start()
        if what == "zombie":
            for driver in self.drivers:
                driver.send_signal(signal.SIGSTOP)
            self.stopped += self.drivers
            self.drivers = []
            self.start()
        if what == "credentials":
            self.end_drivers()
            self.let_credentials_expire()
            self.start()
        return True

    def end_drivers(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.drivers = []

    def let_credentials_expire(self) -> None:
        """A driver whose credentials work for a while must end with exit code 2, or 0 if it was quick."""
        with unreliable(self.endpoint) as (environment, faults):
            self.start(environment["AWS_ENDPOINT_URL"])
            driver = self.drivers.pop()
            with suppress(subprocess.TimeoutExpired):
                driver.wait(20)
            refusal = b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
            faults["answer"] = lambda number, path: (400, refusal)
            assert driver.wait(300) in (0, 2), self.log.read_text()[-2000:]

    def wake_zombies(self) -> None:
        """Let the stopped drivers go on, long after the run is complete."""
        for driver in self.stopped:
            driver.send_signal(signal.SIGCONT)
        for driver in self.stopped:
            with suppress(subprocess.TimeoutExpired):
                driver.wait(60)
            driver.kill()
            driver.wait()


def kill_actor() -> bool:
    """kill -9 an actor of our cluster; returns whether there was one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "MapWorker(MapBatches(GladActor" in " ".join(process.cmdline()):
                found.append(process)
    if found:
        random.choice(found).kill()
    return bool(found)


def rows(storage: Storage, out: str) -> dict[str, list[dict[str, Any]]]:
    """All rows of results and errors by image, without their times."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("results", "errors"):
        filesystem, path = storage.resolve(f"{out}/{name}")
        table: pa.Table = pads.dataset(path, filesystem=filesystem).to_table()
        for row in table.to_pylist():
            row.pop("seconds", None)
            found.setdefault(row["image_id"], []).append(row)
    return found


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="images in the archive")] = 2000,
    kills: Annotated[int, typer.Option(help="disturbances")] = 20,
    pause: Annotated[float, typer.Option(help="seconds between two kills, on average")] = 12.0,
    seed: Annotated[int, typer.Option(help="seed of the moments")] = 0,
) -> None:
    """Measure and print."""
    random.seed(seed)
    weed = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
    with tempfile.TemporaryDirectory(prefix="c") as name, serve_s3(weed, Path(name)) as environment:
        folder = Path(name)
        os.environ |= environment | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        (folder / "r/ray").mkdir(parents=True)
        os.environ["RAY_TMPDIR"] = str(folder / "r")
        storage = Storage.from_environment()
        for bucket in ("photos", "verdicts"):
            make_bucket(environment, bucket)
        fill(storage, images)
        bundle = make_tiny_bundle(folder / "tiny")

        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=NODE_CPUS) for _ in range(2)]
        glad = str(Path(sys.executable).parent / "glad")
        command = [glad, "score", ARCHIVE, "--model", str(bundle), "--batch-size", "1", "--address", cluster.address]
        command += ["--actors", "2", "--num-cpus", "0.2", "--out"]
        figures: dict[str, Any] = {"images": images, "disturbances": 0} | dict.fromkeys(TURNS, 0)
        undisturbed = Job([*command, UNDISTURBED], folder / "log", cluster, nodes, environment["AWS_ENDPOINT_URL"])
        job = replace(undisturbed, command=[*command, DISTURBED], drivers=[], stopped=[])
        try:
            started = time.monotonic()
            undisturbed.start()
            while not undisturbed.finished(10):
                pass
            figures["undisturbed_seconds"] = round(time.monotonic() - started, 1)
            started = time.monotonic()
            job.start()
            while not job.finished(random.uniform(0.5, 1.5) * pause):
                what = TURNS[figures["disturbances"] % len(TURNS)]
                if figures["disturbances"] < kills and job.disturb(what):
                    figures[what] += 1
                    figures["disturbances"] += 1
                    print(f"{time.monotonic() - started:.0f} s: {what}", file=sys.stderr, flush=True)
            figures["disturbed_seconds"] = round(time.monotonic() - started, 1)
            before = rows(storage, DISTURBED)
            job.wake_zombies()
            figures["changed_by_zombies"] = before != rows(storage, DISTURBED)
        finally:
            cluster.shutdown()
        expected, found = rows(storage, UNDISTURBED), rows(storage, DISTURBED)
        counts = Counter(len(rows_of_image) for rows_of_image in found.values())
        figures["lost"] = len(expected.keys() - found.keys())
        figures["duplicated"] = sum(count for times, count in counts.items() if times > 1)
        figures["content_equal"] = expected == found
    print(json.dumps(figures) if as_json else "\n".join(f"{name:20} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
