"""Writing results: the last stage of the scoring job."""

from __future__ import annotations

import hashlib
import io
import re
from operator import itemgetter
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import join
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS, ERRORS_SCHEMA, RESULTS, RESULTS_SCHEMA, STAGING, TILE, WRITTEN_SCHEMA

LONGEST_NAME = 200  # bytes; disks take 255
ROW_GROUP_BYTES = 8 * 2**20  # before compression; the writer needs ten times as much, a reader holds a column of one
WRITE_BATCH = 2**16  # values that are encoded at a time; full-size maps have four times as many
# How the columns are written. A map has too many values for a dictionary, and a PNG is compressed. Byte-stream split
# makes maps a quarter smaller, but DuckDB and Polars do not read it for float16.
REPEATING = {"category", "model_id", "stop_reason", "doubt", "stage", "error_type"}
UNSORTED = {"steps", "anomaly_map", "reconstruction", "tiles"}  # their least and largest values find no row
LEAVES = {
    "steps": ("steps.list.element.timestep", "steps.list.element.score"),
    "anomaly_map": ("anomaly_map.list.element",),
    "tiles": tuple(f"tiles.list.element.{field.name}" for field in TILE),
}


class ResultsWriter:
    """A stage: writes `SCORED_SCHEMA` rows to staged files and returns `WRITTEN_SCHEMA` rows, one for each shard.

    Every file has a name that no other call uses. A call that Ray repeats therefore cannot change what its first try
    wrote, which may be committed by then.

    A call holds its rows, which lie in Ray's shared memory and are not copied, and one encoded file at a time.
    """

    def __init__(self, run: Run, rows_per_shard: int, generation: int, staged: str) -> None:
        self.run, self.rows_per_shard, self.generation, self.staged = run, rows_per_shard, generation, staged

    def __call__(self, rows: pa.Table) -> pa.Table:
        shards = pc.divide(rows["position"], self.rows_per_shard)
        written = [self._write(shard, part) for shard, part in sorted(_groups(rows, shards), key=itemgetter(0))]
        return pa.Table.from_pylist(written, schema=WRITTEN_SCHEMA)

    def _write(self, shard: int, rows: pa.Table) -> dict[str, Any]:
        """Write one shard's rows; returns its `WRITTEN_SCHEMA` row."""
        by_failure = dict(_groups(rows, pc.is_valid(rows["error_type"])))
        results, errors = (
            by_failure.get(failed, rows.slice(0, 0)).select(schema.names).cast(schema)
            for failed, schema in ((False, RESULTS_SCHEMA), (True, ERRORS_SCHEMA))
        )
        tables = [(join(RESULTS, *folder_of(category)), table) for category, table in _groups(results, "category")]
        tables += [(ERRORS, errors)] if len(errors) else []
        if shard == 0:  # both datasets exist, even if neither has a row
            tables += [(RESULTS, results)] if not len(results) else [(ERRORS, errors)] if not len(errors) else []
        files = {f"{folder}/{part_name(shard, self.generation)}": table for folder, table in tables}
        return {
            "shard": shard,
            "scored": len(results),
            "anomalies": pc.sum(results["is_anomalous"]).as_py() or 0,
            "errors": len(errors),
            "doubtful": len(results) - results["doubt"].null_count,
            "pages": pc.sum(rows["further"]).as_py() or 0,
            "shard_pages": pc.max(rows["shard_pages"]).as_py() or 0,
            "unjudged": pc.sum(rows["unjudged"]).as_py() or 0,
            "staged": self.staged,
            "files": list(files),
            "sizes": [self._write_file(file, table) for file, table in files.items()],
        }

    def _write_file(self, file: str, table: pa.Table) -> int:
        """Write one staged file; returns its size."""
        data = parquet(table)
        self.run.storage.write(self.run.path(self.staged, file), data)
        return len(data)


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


def _groups(rows: pa.Table, by: str | pa.ChunkedArray) -> list[tuple[Any, pa.Table]]:
    """The rows of each value of a column, or of ``by`` itself. They are slices of the table: no map is copied."""
    keys = (rows[by] if isinstance(by, str) else by).combine_chunks().dictionary_encode(null_encoding="encode")
    codes = keys.indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    ends = [*starts[1:], len(codes)]
    slices: dict[Any, list[pa.Table]] = {}
    for start, end in zip(starts, ends, strict=False):
        slices.setdefault(keys[start].as_py(), []).append(rows.slice(start, end - start))
    return [(key, pa.concat_tables(tables)) for key, tables in slices.items()]


def parquet(table: pa.Table) -> bytes:
    """A table of results or errors as a Parquet file, in row groups of `ROW_GROUP_BYTES`."""
    stream = io.BytesIO()  # its getvalue() is no copy
    names = table.schema.names
    pq.write_table(
        table,
        stream,
        row_group_size=max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes)),
        use_dictionary=[name for name in names if name in REPEATING],
        compression={path: "zstd" for name in names for path in LEAVES.get(name, (name,)) if name != "reconstruction"},
        write_statistics=[name for name in names if name not in UNSORTED],
        write_batch_size=WRITE_BATCH,
    )
    return stream.getvalue()
