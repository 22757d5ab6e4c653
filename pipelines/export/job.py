"""`glad export`: a finished run in the formats of others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.dataset as pads
from rich.console import Console
from rich.markup import escape

from cluster.storage import absolute, clear_errors, join
from glad_core.errors import GladError
from pipelines.export import label_studio, pictures, tables
from pipelines.export.coco import Coco
from pipelines.export.images import judged
from pipelines.export.verdicts import verdicts
from pipelines.runs import feedback
from pipelines.runs.query import DECIDED, Query, condition
from pipelines.runs.run import Run

Kind = Literal["csv", "masks", "coco", "label-studio", "delta", "iceberg"]
TABLES = ("delta", "iceberg")


def export(run_folder: str, kinds: Collection[Kind], query: Query, out: str, console: Console) -> dict[str, Any]:
    """Write the results that match a query to the folder ``out``, and register all of them as tables.

    Returns:
        The number of ``images`` and ``alarms`` that matched, ``files`` by kind, and what was left out (``left_out``).

    Raises:
        GladError, StorageError: no finished run, nothing matches, a package is missing, or ``out`` cannot be written.
    """
    if not kinds:
        raise GladError("say what to export: --csv, --masks, --coco, --label-studio, --delta or --iceberg")
    run, folder = Run.at(run_folder), absolute(out)
    results = run.results()
    marks = {mark["image_id"]: mark for mark in feedback.read_marks(run)}
    matching = condition(query, {image_id: mark["verdict"] for image_id, mark in marks.items()})
    if matching is not None and (refused := [f"--{kind}" for kind in TABLES if kind in kinds]):
        raise GladError(
            f"{' and '.join(refused)} registers whole files: leave the filter out, and filter in your query"
        )
    called = DECIDED & pads.field("is_anomalous")
    alarms = called if matching is None else matching & called
    with clear_errors(run.location, run.storage):
        done: dict[str, Any] = {"images": results.count_rows(filter=matching), "files": {}, "left_out": {}}
        done["alarms"] = results.count_rows(filter=alarms)
        if not done["images"]:
            raise GladError(f"{run.location}: no image matches the filter; {_known(results)}")
        if "csv" in kinds:
            _write_verdicts(run, results, matching, marks, folder, done)
        if {"masks", "coco", "label-studio"} & set(kinds):
            _write_images(run, results, matching, kinds, folder, done)
        if "delta" in kinds:
            done["files"]["delta"] = tables.delta(run, results)
        if "iceberg" in kinds:
            done["files"]["iceberg"] = tables.iceberg(run, results, join(folder, "iceberg"))
    _say(done, console)
    if Run.at(run_folder).record != run.record:
        console.print("[yellow]the run has grown meanwhile: export it again for what has come since[/yellow]")
    return done


def _write_verdicts(
    run: Run,
    results: pads.Dataset,
    matching: pc.Expression | None,
    marks: dict[str, dict[str, Any]],
    folder: str,
    done: dict[str, Any],
) -> None:
    data, _, guarded = verdicts(run, results, matching, marks)
    done["files"]["csv"] = join(folder, "verdicts.csv")
    run.storage.write(done["files"]["csv"], data)
    if guarded:
        done["left_out"]["texts that begin like a formula, with an apostrophe before them in verdicts.csv"] = guarded


def _write_images(
    run: Run,
    results: pads.Dataset,
    matching: pc.Expression | None,
    kinds: Collection[Kind],
    folder: str,
    done: dict[str, Any],
) -> None:
    """Everything that needs heat maps, in one pass: masks, COCO and tasks for Label Studio."""
    coco = Coco(run.record.get("source", ""), run.location) if "coco" in kinds else None
    masks, heat = join(folder, "masks"), join(folder, "heat")
    if "masks" in kinds and run.storage.kind(masks) == "folder" and next(run.storage.walk(masks), None):
        raise GladError(f"{masks}: holds masks of an earlier export; delete them, or choose another --out")
    tasks: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    categories = set()
    for image in judged(run, results, matching):
        categories.add(image.category)
        left_out["images without threshold: without regions"] += image.row["threshold"] is None
        left_out["images without a finite score or threshold: undecided, without regions"] += not image.is_decided
        left_out["alarms without a region above the threshold"] += image.is_alarm and not image.regions
        if coco is not None:
            coco.add(image, left_out)
        if "label-studio" in kinds:
            tasks.append(label_studio.task(image, left_out))
        if "masks" in kinds:
            run.storage.write(join(masks, f"{image.file}.png"), pictures.mask(image))
            run.storage.write(join(heat, f"{image.file}.png"), pictures.heat(image))
    files = {"masks": masks, "coco": join(folder, "coco.json"), "label-studio": join(folder, "label-studio.json")}
    done["files"] |= {kind: file for kind, file in files.items() if kind in kinds}
    if coco is not None:
        run.storage.write(files["coco"], json.dumps(coco.finished(), allow_nan=False).encode())
    if "label-studio" in kinds:
        run.storage.write(files["label-studio"], json.dumps(tasks, allow_nan=False).encode())
        run.storage.write(join(folder, "label-studio.xml"), label_studio.labels(categories).encode())
    done["left_out"] |= {reason: number for reason, number in left_out.items() if number}


def _known(results: pads.Dataset) -> str:
    """What a user is most likely to have spelled otherwise."""
    names = set(results.to_table(columns=["category"])["category"].unique().to_pylist()) - {None}
    return f"its categories: {', '.join(sorted(names)[:20]) or 'none'}"


def _say(done: dict[str, Any], console: Console) -> None:
    """What was written where, and what is not in it."""
    console.print(f"{done['images']} images, {done['alarms']} of them alarms", highlight=False)
    for kind, file in done["files"].items():
        console.print(f"{kind}: {escape(file)}", highlight=False, soft_wrap=True)
    for reason, number in done["left_out"].items():
        console.print(f"[yellow]{number} {reason}[/yellow]", highlight=False, soft_wrap=True)
