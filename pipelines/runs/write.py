"""Writing a run: the last stage of the scoring job, and run.json at the end."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import join
from pipelines.runs.run import Run
from pipelines.runs.schema import COMPLETE, ERRORS, ERRORS_SCHEMA, RESULTS, RESULTS_SCHEMA, WRITTEN_SCHEMA

LONGEST_NAME = 200  # bytes; disks take 255


class ResultsWriter:
    """A stage: writes `SCORED_SCHEMA` rows to files and returns `WRITTEN_SCHEMA` rows, one for each shard.

    A file is named after the attempt and the images in it. A call that is retried therefore replaces its own file, and
    never that of another attempt.
    """

    def __init__(self, run: Run, rows_per_shard: int, attempt: str) -> None:
        self.run, self.rows_per_shard, self.attempt = run, rows_per_shard, attempt

    def __call__(self, rows: pa.Table) -> pa.Table:
        shards = pc.divide(rows["position"], self.rows_per_shard)
        written = [
            self._write(shard, rows.filter(pc.equal(shards, shard))) for shard in sorted(pc.unique(shards).to_pylist())
        ]
        return pa.Table.from_pylist(written, schema=WRITTEN_SCHEMA)

    def _write(self, shard: int, rows: pa.Table) -> dict[str, Any]:
        """Write one shard's rows; returns its `WRITTEN_SCHEMA` row."""
        failed = pc.is_valid(rows["error_type"])
        results = rows.filter(pc.invert(failed)).select(RESULTS_SCHEMA.names).cast(RESULTS_SCHEMA)
        errors = rows.filter(failed).select(ERRORS_SCHEMA.names).cast(ERRORS_SCHEMA)
        tables = [(join(RESULTS, *folder_of(category)), table) for category, table in _by_category(results)]
        tables += [(ERRORS, errors)] if len(errors) else []
        prefix = f"{shard:08d}-{self.attempt}"
        return {
            "shard": shard,
            "scored": len(results),
            "anomalies": pc.sum(results["is_anomalous"]).as_py() or 0,
            "errors": len(errors),
            "files": [f"{folder}/{_write_part(self.run, folder, table, prefix)}" for folder, table in tables],
        }


def folder_of(category: str | None) -> tuple[str, ...]:
    """The folder in results/ for a category, () for none.

    Its name is the category's own with odd characters as %XX: no "=", which readers take for a partition column, and no
    leading "." or "_", which they skip. A name too long for a disk is cut and made unique by a hash.
    """
    if not category:
        return ()
    name = re.sub(r"^[._]|[^\w.~ -]", lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), category)
    if len(name.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(category.encode()).hexdigest()[:16]
        name = f"{name.encode()[: LONGEST_NAME // 2].decode(errors='ignore')}-{digest}"
    return (name,)


def complete(run: Run, record: dict[str, Any]) -> None:
    """Finish a run. Both datasets exist even if one has no rows; run.json, the ``record``, is written last."""
    for name, schema, count in ((RESULTS, RESULTS_SCHEMA, "scored"), (ERRORS, ERRORS_SCHEMA, "errors")):
        if record["counts"][count] == 0:
            _write_part(run, name, schema.empty_table(), "none")
    run.storage.write(run.path(COMPLETE), (json.dumps(record, indent=1) + "\n").encode())


def _by_category(results: pa.Table) -> Iterator[tuple[str | None, pa.Table]]:
    for category in pc.unique(results["category"]).to_pylist():
        column = results["category"]
        yield category, results.filter(pc.is_null(column) if category is None else pc.equal(column, category))


def _write_part(run: Run, folder: str, table: pa.Table, prefix: str) -> str:
    """Write one file into a folder of the run and return its name."""
    ids = "\n".join(sorted(table["image_id"].to_pylist()))
    name = f"part-{prefix}-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.parquet"
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    run.storage.write(run.path(folder, name), stream.getvalue())
    return name
