"""What people said of a run's results, beside them: DEST/feedback/IMAGE_ID.parquet, one row each.

A file per image makes a mark whole or absent, the last one win, and two people on one run no conflict.
"""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from cluster.storage import Storage, clear_errors, is_s3, join, local_path
from glad_core.errors import GladError
from pipelines.runs.schema import read_run

FEEDBACK = "feedback"
Verdict = Literal["confirmed", "false_alarm"]
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("category", pa.string()),
        ("model_id", pa.string()),  # of the model that judged it
        ("score", pa.float32()),
        ("verdict", pa.string()),  # confirmed: a defect indeed; false_alarm: the image is good
        ("marked_at", pa.timestamp("s", tz="UTC")),
    ]
)


def mark(folder: str, row: dict[str, Any], verdict: Verdict | None, storage: Storage) -> None:
    """Keep what was said of a result; None takes it back."""
    place = join(folder, FEEDBACK, f"{row['image_id']}.parquet")
    if verdict is None:
        storage.delete_file(place)
        return
    said = {name: row.get(name) for name in SCHEMA.names} | {"verdict": verdict, "marked_at": datetime.now(UTC)}
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([said], schema=SCHEMA), stream)
    storage.write(place, stream.getvalue())


def read_marks(run: str, storage: Storage) -> list[dict[str, Any]]:
    """Everything said of a run's results, as `SCHEMA` has it; empty where nobody has said anything."""
    folder = run.rstrip("/") if is_s3(run) else local_path(run)
    place = join(folder, FEEDBACK)
    if storage.kind(place) != "folder":
        return []
    filesystem, path = storage.resolve(place)
    with clear_errors(place, storage):
        return pads.dataset(path, filesystem=filesystem, schema=SCHEMA).to_table().to_pylist()


def require_marks(run: str, storage: Storage) -> list[dict[str, Any]]:
    """`read_marks` of a finished run that has some.

    Raises:
        GladError: no finished run there, or nobody marked anything.
    """
    folder = run.rstrip("/") if is_s3(run) else local_path(run)
    read_run(folder, storage)
    found = read_marks(folder, storage)
    if not found:
        raise GladError(f"{folder}: no feedback there; mark results with `glad view {run}`")
    return found
