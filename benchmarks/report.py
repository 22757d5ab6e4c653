"""How long the report of a long run takes, to make and to open.

    python benchmarks/report.py [--json] [--images 10000]

build_seconds    of `glad report` as a command, start of Python included
open_seconds     until headless Chromium shows the first cards and all plots are drawn
console_errors   that the page made meanwhile
size_mb          of the page

The run is written by the product's own functions: results of drawn boards, scored by the small model, repeated under
other names with their scores moved a little; every image is a file of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import typer
from PIL import Image
from rich.console import Console

from cluster.storage import Storage
from pipelines.demo.boards import board_rng, make_board
from pipelines.runs.run import Run
from pipelines.runs.schema import SCORED_SCHEMA, read_run
from pipelines.runs.write import ResultsWriter, complete
from pipelines.score import job

DISTINCT = 40
ROWS = 256  # of a shard
CHROMIUM = "/usr/bin/chromium"


def long_run(folder: Path, images: int) -> Path:
    """A finished run over so many images."""
    archive = folder / "boards"
    archive.mkdir()
    for index in range(DISTINCT):
        kind = "scratch" if index % 4 == 0 else None
        board, _ = make_board(board_rng(5, kind or "good", index), kind)
        Image.fromarray(board).save(archive / f"{index:06d}.png")
    seed, run, storage = folder / "seed", folder / "run", Storage()
    job.score(job.ScoreRequest(str(archive), str(seed), reconstructions=True), Console(quiet=True))
    scored = pads.dataset(seed / "results").to_table().to_pylist()
    (listed,) = pads.dataset(seed / "manifest").to_table().to_pylist()[:1]
    rng = np.random.default_rng(0)
    write = ResultsWriter(Run(str(run), storage), ROWS, "bench")
    manifest = []
    for start in range(0, images, ROWS):
        rows = []
        for position in range(start, min(start + ROWS, images)):
            row = scored[position % DISTINCT]
            place = archive / f"copy-{position:06d}.png"
            os.link(row["uri"], place)
            moved = row["score"] * float(rng.uniform(0.8, 1.2))
            # As in a factory, few are anomalous.
            if row["is_anomalous"] and rng.random() > 0.2:
                moved = 0.5 * row["threshold"] * float(rng.uniform(0.3, 1))
            rows.append(
                row
                | {"image_id": f"{position:032x}", "uri": str(place), "position": position, "score": moved}
                | {"is_anomalous": moved > row["threshold"], "stage": None, "error_type": None, "message": None}
            )
            manifest.append(listed | {"image_id": f"{position:032x}", "uri": str(place), "size": place.stat().st_size})
        write(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA))
    (run / "manifest").mkdir()
    pq.write_table(pa.Table.from_pylist(manifest), run / "manifest" / "part-000000.parquet")
    record = read_run(str(seed), storage)
    complete(Run(str(run), storage), record | {"counts": record["counts"] | {"images": images, "scored": images}})
    return run


def opened(page: Path) -> tuple[float, list[str]]:
    """Seconds until the page is there, and what it complained of."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 1000})
        tab.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        started = time.perf_counter()
        tab.goto(page.as_uri())
        tab.wait_for_selector("#scores svg")
        tab.wait_for_selector(".card .curve svg")
        tab.wait_for_function("[...document.images].slice(0, 6).every((image) => image.complete)")
        seconds = time.perf_counter() - started
        browser.close()
    return seconds, errors


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="of the run")] = 10_000,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        run, page = long_run(Path(name), images), Path(name) / "report.html"
        started = time.perf_counter()
        glad = Path(sys.executable).with_name("glad")
        subprocess.run([glad, "report", run, "--out", page], check=True, stdout=subprocess.DEVNULL)
        build = time.perf_counter() - started
        seconds, errors = opened(page)
        figures = {
            "images": images,
            "build_seconds": round(build, 2),
            "open_seconds": round(seconds, 2),
            "console_errors": len(errors),
            "size_mb": round(page.stat().st_size / 1e6, 2),
        }
    for error in errors:
        print(error)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:16} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
