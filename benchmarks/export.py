"""Time to export 10,000 alarms.

    python benchmarks/export.py [--json] [--alarms 10000]

alarms                          of the run that is exported
coco_seconds, csv_seconds       of `glad export --coco` and `--csv` without the start of Python
label_studio_seconds            of `--label-studio`
delta_seconds_per_1000_files    of `--delta`, per 1000 Parquet files of the run
counts_equal                    whether pandas, pycocotools and deltalake find as many alarms as the run has

The run: drawn boards judged by the small model. Its alarms are written again under other names, by the writer of
`glad score`, in as many files as a job of that size writes.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer
from deltalake import DeltaTable
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from judged_run import finish_run

from pipelines.demo.boards import board_rng, make_board
from pipelines.export.job import Kind, export
from pipelines.runs.query import Query
from pipelines.runs.run import Run
from pipelines.runs.schema import SCORED_SCHEMA
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest

DISTINCT = 24  # boards that are drawn and judged, all with a scratch
QUIET = Console(quiet=True)


def run_of_alarms(folder: Path, alarms: int) -> str:
    """Write a finished run of so many alarms and return its location."""
    archive = folder / "boards"
    archive.mkdir()
    for index in range(DISTINCT):
        board, _ = make_board(board_rng(5, "scratch", index), "scratch")
        Image.fromarray(board).save(archive / f"{index:06d}.png")
    seed, run = Run.at(str(folder / "seed")), Run.at(str(folder / "run"))
    score(ScoreRequest(str(archive), seed.location, model="small"), QUIET)
    found = [row for row in seed.results().to_table().to_pylist() if row["is_anomalous"]]
    nothing = {"stage": None, "error_type": None, "message": None}
    rows = [
        found[index % len(found)]
        | {"image_id": f"{index:032x}", "uri": str(archive / f"copy-{index:06d}.png"), "position": index}
        | nothing
        for index in range(alarms)
    ]
    manifest = [{"image_id": row["image_id"], "uri": row["uri"], "size": None, "shard": None} for row in rows]
    tables = [pa.Table.from_pylist(rows[at : at + 256], schema=SCORED_SCHEMA) for at in range(0, alarms, 256)]
    finish_run(run, pa.concat_tables(tables), pa.Table.from_pylist(manifest), seed.record)
    return run.location


def main(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")] = False,
    alarms: Annotated[int, typer.Option(help="number of alarms of the run")] = 10_000,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        run, out = run_of_alarms(Path(name), alarms), Path(name) / "out"
        kinds: tuple[Kind, ...] = ("coco", "csv", "label-studio", "delta")
        seconds = {}
        for kind in kinds:
            started = time.perf_counter()
            export(run, [kind], Query(), str(out), QUIET)
            seconds[kind] = time.perf_counter() - started
        table = DeltaTable(f"{run}/results")
        coco = COCO(out / "coco.json")
        counts = {
            len(pd.read_csv(out / "verdicts.csv").query("verdict == 'anomalous'")),
            len({annotation["image_id"] for annotation in coco.anns.values()}),
            table.to_pyarrow_dataset().count_rows(),
        }
        figures = {
            "alarms": alarms,
            "regions": len(coco.anns),
            "files": len(table.file_uris()),
            "coco_seconds": round(seconds["coco"], 2),
            "csv_seconds": round(seconds["csv"], 2),
            "label_studio_seconds": round(seconds["label-studio"], 2),
            "delta_seconds_per_1000_files": round(seconds["delta"] * 1000 / len(table.file_uris()), 2),
            "counts_equal": counts == {alarms},
        }
    print(json.dumps(figures) if as_json else "\n".join(f"{name:28} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
