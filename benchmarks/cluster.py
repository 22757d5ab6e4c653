# ruff: noqa: E402  (a guard comes before the imports)
"""How a job fares on a cluster: many GPUs, one that is lost, one that is broken; its requests, its writers, retraining.

    python benchmarks/cluster.py [--json] [--only NAME ...]

The cluster is logical: Ray nodes on this machine that claim to have GPUs, and actors that sleep for as long as a GPU
would compute (.5 to 1.5 times the mean, by image). All else is the real job: listing, decoding, writing, commits.

occupancy_16, _48          share of the slots of 16 and 48 actors that held an image, from a minute after the last
                           actor's first image (two cores start 48 processes one by one) to 95 % of the archive
processes_over_actors      processes started for actors, divided by the actors; the larger of both runs
committed_lag_shards       images judged but not committed, at most, in shards, with one of four GPUs lost at 20 % and
                           not replaced; the bar is lag_limit, two shards per actor
bad_actor_survived         a job with one of four actors that can never start is complete
null_actors                most actors tried that start and whose job never stops for more than a second
requests_per_image         requests to S3 for an image's bytes (s3_requests.py)
writer_images_per_second_512    of one writer with 512 x 512 maps, by the former way's (writers.py)
stream_cpus_min, retrain_40_ok  see retrain.py
"""

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

here = Path(__file__).resolve().parent
if __name__ == "cluster":  # a script in this folder, or a Ray process of one, looked for the package of that name
    searched, sys.path[:] = sys.path[:], [folder for folder in sys.path if Path(folder).resolve() != here]
    del sys.modules["cluster"]
    importlib.import_module("cluster")
    sys.path[:] = searched

from cluster import session
from pipelines.runs.run import Run
from pipelines.score import dataflow
from pipelines.score import job as score_job
from pipelines.score.actor import GladActor

SLOTS = 8
LENGTH = 260.0  # seconds that the jobs of `occupancy` should take
STALL = 1.0  # seconds
QUIET = Console(quiet=True)


def sleeping(folder: Path, seconds: float, bad: bool = False) -> type:
    """An actor class that sleeps ``seconds`` for an image on average and notes every image in ``folder``.

    Args:
        bad: the first of the actors can never start.
    """

    class Sleeping(GladActor):
        def _prepare(self) -> None:
            self.free = asyncio.Semaphore(SLOTS)
            (folder / f"started-{os.getpid()}").touch()
            if bad:
                (folder / "bad").open("a").write(f"{self.name}\n")
                if (folder / "bad").read_text().startswith(self.name):
                    raise RuntimeError("CUDA error: no device")
            self.note = (folder / f"{os.getpid()}.trace").open("a", buffering=1)

        async def _judge(self, row: dict[str, Any], image: Any) -> dict[str, Any]:
            async with self.free:
                start = time.time()
                await asyncio.sleep(seconds * (0.5 + row["position"] * 7919 % 1000 / 1000))
                self.note.write(f"{start} {time.time()} {row['position']}\n")
            self._tell()
            kept = {name: row[name] for name in ("image_id", "uri", "category", "width", "height", "position")}
            maps = {"anomaly_map": np.zeros(256, np.float16), "map_height": 16, "map_width": 16}
            return kept | maps | {"model_id": "null", "score": 0.0, "stop_reason": "none", "steps": [], "seconds": 0.0}

    Sleeping.__name__ = Sleeping.__qualname__ = "GladActor"
    return Sleeping


def trace(folder: Path) -> np.ndarray:
    """Start, end and position of every image so far, by end, float64 [N, 3]."""
    lines = [line.split() for file in folder.glob("*.trace") for line in file.read_text().splitlines()]
    found = np.array([line for line in lines if len(line) == 3], float).reshape(-1, 3)
    return found[np.argsort(found[:, 1])]


@contextmanager
def cluster_of(nodes: int, gpus: int) -> Iterator[tuple[Any, list[Any]]]:
    """A logical cluster with as many GPUs on each node, joined by this process."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        members = [cluster.add_node(num_cpus=gpus // 2 + 1, num_gpus=gpus) for _ in range(nodes)]
        session.connect(cluster.address)
        yield cluster, members
    finally:
        session.disconnect()
        cluster.shutdown()


def run_job(folder: Path, actor: type, images: int, address: str) -> Path:
    """`glad score` of an archive with these actors; returns the run folder."""
    from pipeline import long_folder

    shutil.rmtree(folder / "archive", ignore_errors=True)
    (folder / "archive").mkdir()
    archive = long_folder(folder / "archive", images)
    real, dataflow.GladActor = dataflow.GladActor, actor  # type: ignore[misc, assignment]
    try:
        request = score_job.ScoreRequest(str(archive), str(folder / "run"), "small", batch_size=SLOTS, address=address)
        score_job.score(request, QUIET)
    finally:
        dataflow.GladActor = real  # type: ignore[misc]
    return folder / "run"


def occupancy(folder: Path, nodes: int, gpus: int, seconds: float) -> dict[str, float]:
    actors = nodes * gpus
    images = int(actors * SLOTS * LENGTH / seconds)
    with cluster_of(nodes, gpus) as (cluster, _):
        run_job(folder, sleeping(folder, seconds), images, cluster.address)
    found, starts = trace(folder), [float(file.read_text().split()[0]) for file in folder.glob("*.trace")]
    first, last = max(starts) + 60, found[int(0.95 * images), 1]
    busy = np.clip(np.minimum(found[:, 1], last) - np.maximum(found[:, 0], first), 0, None).sum()
    return {
        f"occupancy_{actors}": busy / (actors * SLOTS * (last - first)),
        f"processes_{actors}": len(list(folder.glob("started-*"))),
        f"start_{actors}_seconds": max(starts) - min(starts),
        f"window_{actors}_seconds": last - first,
    }


def lost_gpu(folder: Path) -> dict[str, float]:
    """One of four nodes of one GPU is lost at 20 % of the archive and does not come back."""
    images, seconds, lags = 1600, 2.0, [0.0]
    ended = threading.Event()

    def watch(cluster: Any, node: Any) -> None:
        lost = False
        while not ended.wait(0.5):
            done = {position for *_, position in trace(folder).tolist()}
            commits = [json.loads(file.read_text()) for file in (folder / "run/commits").glob("*.json")]
            if not commits:
                continue
            rows = json.loads((folder / "run/plan.json").read_text())["rows_per_shard"]
            lags.append((len(done) - sum(commit["scored"] for commit in commits)) / rows)
            if not lost and len(done) >= 0.2 * images:
                lost = True
                cluster.remove_node(node, allow_graceful=False)

    with cluster_of(4, 1) as (cluster, nodes):
        watcher = threading.Thread(target=watch, args=(cluster, nodes[0]))
        watcher.start()
        try:
            out = run_job(folder, sleeping(folder, seconds), images, cluster.address)
        finally:
            ended.set()
            watcher.join()
    assert Run.at(str(out)).results().count_rows() == images
    return {"committed_lag_shards": max(lags), "lag_limit": 8.0}


def bad_actor(folder: Path) -> dict[str, bool]:
    images = 800
    with cluster_of(4, 1) as (cluster, _):
        out = run_job(folder, sleeping(folder, 1.0, bad=True), images, cluster.address)
    tries = (folder / "bad").read_text().split()
    assert len(set(tries)) == 4, tries
    return {
        "bad_actor_survived": Run.at(str(out)).results().count_rows() == images,
        "bad_actor_tries": tries.count(tries[0]),
    }


def null_actors(folder: Path) -> dict[str, float]:
    """More and more actors, until a job stops for more than `STALL` or does not start."""
    figures: dict[str, float] = {"null_actors": 0}
    for actors in (64, 80, 96, 112):
        part = folder / str(actors)
        part.mkdir()
        seconds = actors * SLOTS / 100  # 100 images a second, whatever the number of actors
        with cluster_of(2, actors // 2) as (cluster, _):
            run_job(part, sleeping(part, seconds), 100 * 150, cluster.address)
        ends = trace(part)[:, 1]
        first = trace(part)[0, 0] + 60
        started = len(list(part.glob("started-*")))
        figures[f"longest_stall_{actors}"] = float(
            np.diff(ends[(ends > first) & (ends < ends[int(0.95 * len(ends))])]).max()
        )
        figures[f"processes_{actors}"] = started
        print(json.dumps(figures), file=sys.stderr, flush=True)
        if figures[f"longest_stall_{actors}"] > STALL:
            break
        figures["null_actors"] = actors
    return figures


def both_occupancies(folder: Path) -> dict[str, float]:
    figures: dict[str, float] = {}
    for actors, seconds in ((16, 2.0), (48, 4.0)):
        part = folder / str(actors)
        part.mkdir()
        figures |= occupancy(part, 2, actors // 2, seconds)
        print(json.dumps(figures), file=sys.stderr, flush=True)
    figures["processes_over_actors"] = max(figures[f"processes_{actors}"] / actors for actors in (16, 48))
    return figures


def of_script(name: str, *keys: str) -> Callable[[Path], dict[str, Any]]:
    """Figures that another script of this folder measures."""

    def measure(folder: Path) -> dict[str, Any]:
        words = [sys.executable, str(here / f"{name}.py"), "--json"]
        output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        return {key: figures[key] for key in keys}

    return measure


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "occupancy": both_occupancies,
    "lost_gpu": lost_gpu,
    "bad_actor": bad_actor,
    "requests": of_script("s3_requests", "requests_per_image"),
    "writers": of_script("writers", "writer_images_per_second_512"),
    "retrain": of_script("retrain", "stream_cpus_min", "retrain_40_ok"),
    "null_actors": null_actors,
}


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(MEASURES)}; may be repeated")] = None,
) -> None:
    """Measure and print."""
    os.environ |= session.QUIET | {"OMP_NUM_THREADS": "1"}
    figures: dict[str, Any] = {}
    for name in only or MEASURES:
        with tempfile.TemporaryDirectory(prefix="c", ignore_cleanup_errors=True) as folder:
            (Path(folder) / "r/ray").mkdir(parents=True)
            os.environ["RAY_TMPDIR"] = f"{folder}/r"
            figures |= MEASURES[name](Path(folder))
        print(json.dumps(figures), file=sys.stderr, flush=True)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:30} {value:.4g}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
