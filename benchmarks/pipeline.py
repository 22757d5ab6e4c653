"""What the Ray job costs on top of the engine, and whether it stays flat over a long archive.

    python benchmarks/pipeline.py [--json]

ray_overhead           seconds of `glad score` with one actor (from the first task to the last file, start of the actor
                       included), divided by those of the bare engine on the same images, already decoded (its start not
                       included; mean of a run before the job and one after it, since a machine's speed drifts)
two_actors_over_one    images/s with two actors, divided by those with one
driver_rss_growth_mb   growth of the driver's memory over 50,000 images (list, decode and write, with a null model)
rate_last_over_first   images/s of the last tenth of these images, divided by those of the first tenth after the first
                       file
rate_second            images/s of the second tenth; the first includes what was decoded while actors started
"""

import json
import os
import resource
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import typer
from PIL import Image
from rich.console import Console

from cluster import session
from glad_core.bundle.model import load_bundle
from glad_core.decoding.picture import decode
from glad_core.engine.base import run
from glad_core.engine.engine import Engine
from glad_core.engine.process import keep_buffers
from glad_core.verdict import Request
from pipelines.demo.boards import board_rng, make_board
from pipelines.models.find import SMALL_BUNDLE
from pipelines.runs.schema import SCORED_SCHEMA
from pipelines.score import dataflow
from pipelines.score import job as score_job
from pipelines.score.actor_plan import CPU_SLOTS

DISTINCT = 100  # pictures in the long archive; the rest are hard links to them
QUIET = Console(quiet=True)
SEEN: list[tuple[float, int, float]] = []  # time, images done, the driver's memory in MB


class NullActor:
    """A null model in the place of `GladActor`: an empty result for every image, at once."""

    def __init__(self, settings: Any) -> None:
        self.row = {"model_id": "null", "score": 0.0, "stop_reason": "none", "steps": [], "seconds": 0.0}
        self.row |= {"anomaly_map": np.zeros(256, np.float16), "map_height": 16, "map_width": 16}

    async def __call__(self, rows: pa.Table) -> AsyncIterator[pa.Table]:
        kept = rows.drop_columns(["image"]).to_pylist()
        yield pa.Table.from_pylist([self.row | row for row in kept], schema=SCORED_SCHEMA)


class Watch(score_job.Progress):
    """Records the job's progress in `SEEN`."""

    def update(self, done: int, anomalies: int, errors: int) -> None:
        SEEN.append((time.perf_counter(), done, psutil.Process().memory_info().rss / 1e6))


def job(archive: Path, out: Path, actors: int) -> float:
    """Seconds of a scoring job."""
    request = score_job.ScoreRequest(str(archive), str(out), "small", actors=actors)
    counts = score_job.score(request, QUIET)
    assert counts.errors == 0
    return json.loads((out / "run.json").read_text())["seconds"]


def bare_engine(archive: Path) -> float:
    """Seconds of the engine alone, one thread, the images decoded beforehand."""
    model = load_bundle(SMALL_BUNDLE)
    side = model.settings.resolution
    requests = [Request(path.stem, decode(path.read_bytes(), side).pixels) for path in sorted(archive.glob("*.png"))]
    engine = Engine(model, CPU_SLOTS)
    started = time.perf_counter()
    verdicts = list(run(engine, requests))
    assert len(verdicts) == len(requests)
    return time.perf_counter() - started


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="scored with a model; 0 leaves that out")] = 500,
    archive_images: Annotated[int, typer.Option(help="scored with the null model; 0 leaves that out")] = 50_000,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    keep_buffers()  # as actors do
    figures: dict[str, float] = {"images": images, "archive_images": archive_images}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = folder / "boards"
        archive.mkdir()
        for index in range(images):
            kind = "scratch" if index % 10 == 0 else None
            board, _ = make_board(board_rng(3, kind or "good", index), kind)
            Image.fromarray(board).save(archive / f"{index:05d}.png")
        session.connect()
        if images:
            before = bare_engine(archive)
            figures["one_actor_seconds"] = job(archive, folder / "one", 1)
            after = bare_engine(archive)
            figures["engine_seconds"] = (before + after) / 2
            figures["two_actors_seconds"] = job(archive, folder / "two", 2)
            figures["ray_overhead"] = figures["one_actor_seconds"] / figures["engine_seconds"]
            figures["two_actors_over_one"] = figures["one_actor_seconds"] / figures["two_actors_seconds"]
        if archive_images:
            figures |= long_archive(folder, archive_images)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:24} {value:.4g}" for name, value in figures.items()))


def long_folder(folder: Path, images: int) -> Path:
    """An archive of ``images`` files in folders of a thousand, most of them hard links."""
    archive = folder / "long"
    for index in range(images):
        place = archive / f"{index // 1000:03d}" / f"{index:06d}.png"
        if index % 1000 == 0:
            place.parent.mkdir(parents=True)
        if index < DISTINCT:
            board, _ = make_board(board_rng(4, "good", index), None)
            Image.fromarray(board).resize((128, 128)).save(place)
        else:
            os.link(archive / "000" / f"{index % DISTINCT:06d}.png", place)
    return archive


def long_archive(folder: Path, images: int) -> dict[str, float]:
    """An archive of hard links through the job with the null model."""
    archive = long_folder(folder, images)
    real, dataflow.GladActor, score_job.Progress = dataflow.GladActor, NullActor, Watch  # type: ignore[misc, assignment]
    SEEN.clear()
    started, before = time.perf_counter(), psutil.Process().memory_info().rss / 1e6
    score_job.score(score_job.ScoreRequest(str(archive), str(folder / "null"), "small"), QUIET)
    dataflow.GladActor = real  # type: ignore[misc]
    times = np.array([(moment, done) for moment, done, _ in SEEN])

    def rate(first: float, last: float) -> float:
        """Images/s between two shares of the archive."""
        low, high = (np.interp(share * images, times[:, 1], times[:, 0]) for share in (first, last))
        return (last - first) * images / (high - low)

    start = times[0, 1] / images  # the first file written; before it the job starts up
    return {
        "null_images_per_s": images / (times[-1, 0] - started),
        "driver_rss_growth_mb": max(rss for _, _, rss in SEEN) - before,
        "driver_peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "rate_last_over_first": rate(0.9, 1.0) / rate(start, start + 0.1),
        "rate_first": rate(start, start + 0.1),
        "rate_second": rate(0.1, 0.2),
        "rate_last": rate(0.9, 1.0),
    }


if __name__ == "__main__":
    typer.run(main)
