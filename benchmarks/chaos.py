"""What the results hold after twenty kill -9 during one job.

    python benchmarks/chaos.py [--json] [--images 2000] [--kills 20]

Archive and results are on a real S3 server; the cluster is a head and two worker nodes on this machine. An actor, the
driver and a node are killed in turn, at random moments. After the driver's death the same command is given again; after
a node's a new node is added. At the end the results must hold every image once, with exactly the content of an
undisturbed run (one image in flight at a time, so that not even rounding differs).
"""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import make_bucket, make_tiny_bundle, serve_s3

from cluster.storage import Storage

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


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a driver in a process of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


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
    kills: Annotated[int, typer.Option(help="kills, of actor, driver and node in turn")] = 20,
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
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        glad = str(Path(sys.executable).parent / "glad")
        command = [glad, "score", ARCHIVE, "--model", str(bundle), "--batch-size", "1", "--address", cluster.address]
        command += ["--actors", "2", "--num-cpus", "0.5", "--out"]
        figures: dict[str, Any] = {"images": images, "kills": 0, "driver_kills": 0}
        try:
            started = time.monotonic()
            assert start([*command, UNDISTURBED], folder / "undisturbed.log").wait() == 0, (
                folder / "undisturbed.log"
            ).read_text()[-2000:]
            figures["undisturbed_seconds"] = round(time.monotonic() - started, 1)
            started = time.monotonic()
            driver = start([*command, DISTURBED], folder / "log")
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = driver.wait(timeout=random.uniform(0.5, 1.5) * pause)
                    assert code == 0, (folder / "log").read_text()[-2000:]
                    break
                if figures["kills"] == kills:
                    continue
                what = ("actor", "driver", "node")[figures["kills"] % 3]
                if what == "actor" and not kill_actor():
                    continue  # none has started yet
                if what == "driver":
                    driver.kill()
                    driver.wait()
                    driver = start([*command, DISTURBED], folder / "log")
                    figures["driver_kills"] += 1
                if what == "node":
                    cluster.remove_node(nodes.pop(0), allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=1))
                figures["kills"] += 1
                print(f"{time.monotonic() - started:.0f} s: killed the {what}", file=sys.stderr, flush=True)
            figures["disturbed_seconds"] = round(time.monotonic() - started, 1)
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
