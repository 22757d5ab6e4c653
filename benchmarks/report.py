"""Time to make and to open the report of a long run.

    python benchmarks/report.py [--json] [--images 10000]

build_seconds    of the command `glad report`, including the start of Python
open_seconds     until headless Chromium shows the first cards and all plots
console_errors   number of errors and warnings of the page
size_mb          of the page

The run: drawn boards scored by the small model, repeated under other names with slightly different scores. Every image
is a file of its own.
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
import typer
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from judged_run import finish_run

from pipelines.demo.boards import board_rng, make_board
from pipelines.runs.run import Run
from pipelines.runs.schema import SCORED_SCHEMA
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest

DISTINCT = 40  # boards that are drawn and scored
ROWS = 256  # copied at a time
CHROMIUM = "/usr/bin/chromium"


def long_run(folder: Path, images: int) -> str:
    """Write a finished run over so many images and return its location."""
    archive = folder / "boards"
    archive.mkdir()
    for index in range(DISTINCT):
        defect = "scratch" if index % 4 == 0 else None
        board, _ = make_board(board_rng(5, defect or "good", index), defect)
        Image.fromarray(board).save(archive / f"{index:06d}.png")
    seed, run = Run.at(str(folder / "seed")), Run.at(str(folder / "run"))
    score(ScoreRequest(str(archive), seed.location, "small", reconstructions=True), Console(quiet=True))
    results = seed.results().to_table().to_pylist()
    listed = next(iter(seed.manifest_rows([results[0]["image_id"]]).values()))
    rng = np.random.default_rng(0)
    manifest, tables = [], []
    for start in range(0, images, ROWS):
        rows = [
            copied(results[index % DISTINCT], index, archive, rng) for index in range(start, min(start + ROWS, images))
        ]
        tables.append(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA))
        manifest += [
            listed | {"image_id": row["image_id"], "uri": row["uri"], "size": os.path.getsize(row["uri"])}
            for row in rows
        ]
    counts = seed.record["counts"] | {"images": images, "scored": images}
    record = seed.record | {"counts": counts}
    finish_run(run, pa.concat_tables(tables), pa.Table.from_pylist(manifest), record)
    return run.location


def copied(result: dict, index: int, archive: Path, rng: np.random.Generator) -> dict:
    """A result under another name and with a slightly different score; as in a factory, few stay anomalous."""
    path = archive / f"copy-{index:06d}.png"
    os.link(result["uri"], path)
    score = result["score"] * float(rng.uniform(0.8, 1.2))
    if result["is_anomalous"] and rng.random() > 0.2:
        score = 0.5 * result["threshold"] * float(rng.uniform(0.3, 1))
    return (
        result
        | {"image_id": f"{index:032x}", "uri": str(path), "position": index, "score": score}
        | {"is_anomalous": score > result["threshold"], "stage": None, "error_type": None, "message": None}
    )


def open_page(page: Path) -> tuple[float, list[str]]:
    """Seconds until a browser shows the page, and the page's errors and warnings."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 1000})
        tab.on("console", lambda line: errors.append(line.text) if line.type in ("error", "warning") else None)
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
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="number of images of the run")] = 10_000,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        run, page = long_run(Path(name), images), Path(name) / "report.html"
        started = time.perf_counter()
        glad = Path(sys.executable).with_name("glad")
        subprocess.run([glad, "report", run, "--out", page], check=True, stdout=subprocess.DEVNULL)
        build = time.perf_counter() - started
        seconds, errors = open_page(page)
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
