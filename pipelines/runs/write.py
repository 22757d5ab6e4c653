"""Writing results: the last stage of the scoring job."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import join
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS, ERRORS_SCHEMA, RESULTS, RESULTS_SCHEMA, STAGING, WRITTEN_SCHEMA

LONGEST_NAME = 200  # bytes; disks take 255


class ResultsWriter:
    """A stage: writes `SCORED_SCHEMA` rows to staged files and returns `WRITTEN_SCHEMA` rows, one for each shard.

    Every file has a name that no other call uses. A call that Ray repeats therefore cannot change what its first try
    wrote, which may be committed by then.
    """

    def __init__(self, run: Run, rows_per_shard: int, generation: int, staged: str) -> None:
        self.run, self.rows_per_shard, self.generation, self.staged = run, rows_per_shard, generation, staged

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
        if shard == 0:  # both datasets exist, even if neither has a row
            tables += [(RESULTS, results)] if not len(results) else [(ERRORS, errors)] if not len(errors) else []
        files = [(f"{folder}/{part_name(shard, self.generation)}", _parquet(table)) for folder, table in tables]
        for file, data in files:
            self.run.storage.write(self.run.path(self.staged, file), data)
        return {
            "shard": shard,
            "scored": len(results),
            "anomalies": pc.sum(results["is_anomalous"]).as_py() or 0,
            "errors": len(errors),
            "staged": self.staged,
            "files": [file for file, _ in files],
            "sizes": [len(data) for _, data in files],
        }


def new_staging(generation: int) -> str:
    """The name of a folder in a run, for one driver's staged files."""
    return join(STAGING, f"{generation}-{uuid4().hex[:16]}")


def part_name(shard: int, generation: int) -> str:
    """A new name for a file of results or errors, as `commits.FILE` reads it."""
    return f"part-{shard:08d}-{generation}-{uuid4().hex[:16]}.parquet"


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


def _by_category(results: pa.Table) -> Iterator[tuple[str | None, pa.Table]]:
    for category in pc.unique(results["category"]).to_pylist():
        column = results["category"]
        yield category, results.filter(pc.is_null(column) if category is None else pc.equal(column, category))


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()
