"""`glad export --csv`: verdicts as a table that spreadsheets open."""

from __future__ import annotations

import csv
import io
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from pipelines.export.images import name_in
from pipelines.runs.query import DECIDED, margin, ratio
from pipelines.runs.run import Run

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which spreadsheets begin a formula
COLUMNS = (
    "image",
    "category",
    "verdict",
    "score",
    "threshold",
    "score / threshold",
    "p-value",
    "feedback",
    "note",
    "doubt",
    "stopped at step",
    "width",
    "height",
    "seconds",
    "uri",
    "model",
    "image_id",
)
READ = {
    name: pads.field(name)
    for name in ("category", "score", "threshold", "doubt", "width", "height", "seconds", "uri", "image_id")
} | {
    "verdict": pc.if_else(DECIDED, pads.field("is_anomalous"), pa.scalar(None, pa.bool_())),
    "decided": DECIDED,
    "p-value": pads.field("p_value"),
    "stopped at step": pads.field("stop_step"),
    "model": pads.field("model_id"),
}


def verdicts(
    run: Run, results: pads.Dataset, matching: pc.Expression | None, marks: dict[str, dict[str, Any]]
) -> tuple[bytes, int, int]:
    """The table, most anomalous first, as UTF-8 with the mark by which Excel knows it.

    A text that begins like a formula gets an apostrophe before it, so that a file's name is never run as one.

    Args:
        marks: rows of `feedback.read_marks` by image id.

    Returns:
        The bytes of the file, the number of images, and the number of texts with an apostrophe.
    """
    columns = READ | {"score / threshold": ratio(run), "margin": margin(run)}
    table = results.to_table(columns=columns, filter=matching).sort_by(
        [("margin", "descending"), ("image_id", "ascending")]
    )
    source, guarded = run.record.get("source", ""), 0
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    for row in table.to_pylist():
        mark = marks.get(row["image_id"], {})
        verdict = {True: "anomalous", False: "good", None: "no threshold"}[row["verdict"]]
        row |= {
            "image": name_in(source, row["uri"]),
            "verdict": verdict if row["decided"] else "undecided",
            "feedback": mark.get("verdict", "").replace("_", " "),
            "note": mark.get("note") or "",
        }
        cells = [_cell(row[name]) for name in COLUMNS]
        guarded += sum(
            cell != row[name] for cell, name in zip(cells, COLUMNS, strict=True) if isinstance(row[name], str)
        )
        writer.writerow(cells)
    return stream.getvalue().encode("utf-8-sig"), len(table), guarded


def _cell(value: Any) -> Any:
    """A value as it is written: numbers as short as their precision allows, texts never as a formula."""
    if isinstance(value, float):
        return f"{value:.7g}"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
