"""Writing a run's results: the last stage of the job, and run.json at its end."""

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

from cluster.storage import Storage, join
from pipelines.runs.schema import COMPLETE, ERRORS, ERRORS_SCHEMA, RESULTS, RESULTS_SCHEMA, WRITTEN_SCHEMA

LONGEST_NAME = 200  # bytes; disks take 255


class ResultsWriter:
    """A stage: `SCORED_SCHEMA` rows in, their files written, a row for each shard out.

    A file is named after the attempt and the images in it, so a call that is retried replaces its own file instead of
    adding one, and no other run's.
    """

    def __init__(self, storage: Storage, dest: str, rows_per_shard: int, attempt: str) -> None:
        self.storage, self.dest, self.rows_per_shard, self.attempt = storage, dest, rows_per_shard, attempt

    def __call__(self, rows: pa.Table) -> pa.Table:
        shard_of = pc.divide(rows["position"], self.rows_per_shard)
        written = []
        for shard in sorted(set(shard_of.to_pylist())):
            part = rows.filter(pc.equal(shard_of, shard))
            failed = pc.is_valid(part["error_type"])
            results = part.filter(pc.invert(failed)).select(RESULTS_SCHEMA.names).cast(RESULTS_SCHEMA)
            errors = part.filter(failed).select(ERRORS_SCHEMA.names).cast(ERRORS_SCHEMA)
            tables = [(join(RESULTS, *folder_of(name)), rows) for name, rows in _by_category(results)]
            tables += [(ERRORS, errors)] if len(errors) else []
            prefix = f"{shard:08d}-{self.attempt}"
            files = [
                f"{folder}/{_write_part(self.storage, join(self.dest, folder), table, prefix)}"
                for folder, table in tables
            ]
            anomalies = pc.sum(results["is_anomalous"]).as_py() or 0
            counts = {"scored": len(results), "anomalies": anomalies, "errors": len(errors)}
            written.append({"shard": shard, "files": files} | counts)
        return pa.Table.from_pylist(written, schema=WRITTEN_SCHEMA)


def folder_of(category: str | None) -> tuple[str, ...]:
    """The folder below results/ for a category, () for none.

    Its name is the category's own with odd characters as %XX: no "=", which readers take for a column of partitions,
    and no leading "." or "_", which they pass over. A name too long for a disk is cut and told apart by a hash.
    """
    if not category:
        return ()
    name = re.sub(r"^[._]|[^\w.~ -]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), category)
    if len(name.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(category.encode()).hexdigest()[:16]
        name = f"{name.encode()[: LONGEST_NAME // 2].decode(errors='ignore')}-{digest}"
    return (name,)


def _by_category(results: pa.Table) -> Iterator[tuple[str | None, pa.Table]]:
    for name in pc.unique(results["category"]).to_pylist():
        of_name = pc.is_null(results["category"]) if name is None else pc.equal(results["category"], name)
        yield name, results.filter(of_name)


def _write_part(storage: Storage, folder: str, table: pa.Table, prefix: str) -> str:
    """Write one file and return its name."""
    ids = "\n".join(sorted(table["image_id"].to_pylist()))
    name = f"part-{prefix}-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.parquet"
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    storage.write(join(folder, name), stream.getvalue())
    return name


def complete(dest: str, storage: Storage, run: dict[str, Any]) -> None:
    """Close a run: a reader finds both datasets even if one has no rows; run.json comes last."""
    for name, schema, count in ((RESULTS, RESULTS_SCHEMA, "scored"), (ERRORS, ERRORS_SCHEMA, "errors")):
        if run["counts"][count] == 0:
            _write_part(storage, join(dest, name), schema.empty_table(), "none")
    storage.write(join(dest, COMPLETE), (json.dumps(run, indent=1) + "\n").encode())
