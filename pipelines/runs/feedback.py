"""People's feedback on results, kept beside them: feedback/IMAGE_ID.parquet in the run folder, one row each.

With a file per image a mark is whole or absent, the latest one holds, and two people can mark the same run.
"""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from cluster.storage import clear_errors
from glad_core.errors import GladError
from pipelines.runs.run import Run

FEEDBACK = "feedback"
Verdict = Literal["confirmed", "false_alarm"]
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("category", pa.string()),
        ("model_id", pa.string()),  # of the model that judged it
        ("score", pa.float32()),
        ("verdict", pa.string()),  # confirmed: it is a defect; false_alarm: the image is good
        ("marked_at", pa.timestamp("s", tz="UTC")),
        ("note", pa.string()),  # what the person wrote beside it; null in marks of before 0.2
    ]
)


def mark(run: Run, row: dict[str, Any], verdict: Verdict | None, note: str = "") -> None:
    """Keep a person's verdict on a result, with a note beside it; None deletes both."""
    file = run.path(FEEDBACK, f"{row['image_id']}.parquet")
    if verdict is None:
        run.storage.delete_file(file)
        return
    mark = {name: row.get(name) for name in SCHEMA.names} | {"verdict": verdict, "marked_at": datetime.now(UTC)}
    mark["note"] = note
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([mark], schema=SCHEMA), stream)
    run.storage.write(file, stream.getvalue())


def read_marks(run: Run) -> list[dict[str, Any]]:
    """All marks of a run as `SCHEMA` rows; empty if there are none."""
    if not run.has(FEEDBACK, "folder"):
        return []
    filesystem, path = run.storage.resolve(run.path(FEEDBACK))
    with clear_errors(run.path(FEEDBACK), run.storage):
        return pads.dataset(path, filesystem=filesystem, schema=SCHEMA).to_table().to_pylist()


def require_marks(run: Run) -> list[dict[str, Any]]:
    """`read_marks` of a finished run that has some.

    Raises:
        GladError: no finished run there, or nobody has marked anything.
    """
    _ = run.record
    marks = read_marks(run)
    if not marks:
        raise GladError(f"{run.location}: no feedback there; mark results with `glad view {run.location}`")
    return marks
