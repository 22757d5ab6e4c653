"""The manifest in Parquet: rows that listing tasks write in parts of `PART_ROWS`, read again stretch by stretch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import Storage, clear_errors, join
from glad_core.errors import GladError
from pipelines.archive.earlier import Earlier
from pipelines.archive.rows import Row

PART_ROWS = 512  # rows per manifest file
REPEATING = ["category", "shard", "stage", "error_type", "message"]  # columns whose values come again
STRETCH = 16 * PART_ROWS  # rows of a manifest that are read in one go
READERS = 16  # stretches read at a time

MANIFEST_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("size", pa.int64()),  # bytes; null if a list of URIs named the image
        ("version", pa.string()),  # of the file when it was listed, see `storage.Entry`; null as above, or without one
        ("category", pa.string()),
        ("shard", pa.string()),  # the tar file an image lies in, and its first byte there
        ("offset", pa.int64()),
        ("stage", pa.string()),  # set if listing itself failed
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("position", pa.int64()),  # among the rows of its task, from 0
    ]
)


def write_part(folder: str, number: int, part: int, rows: list[Row], storage: Storage) -> None:
    """Write part ``part`` of listing task ``number``, at most `PART_ROWS` rows."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), stream, use_dictionary=REPEATING)
    storage.write(_part(folder, number, part), stream.getvalue())


def read_manifest(folder: str, listed: Sequence[int], first: int, last: int, storage: Storage) -> pa.Table:
    """The manifest's rows from position ``first`` to before ``last``; their ``position`` is that in the whole.

    Args:
        listed: number of rows from each listing task.

    Raises:
        GladError: a part is damaged.
        StorageError: a part is missing or cannot be read.
    """
    tables = []
    for number, (end, rows) in enumerate(zip(accumulate(listed), listed, strict=True)):
        start = end - rows
        low, high = max(first, start) - start, min(last, end) - start
        for part in range(low // PART_ROWS, -(-high // PART_ROWS) if low < high else 0):
            file = _part(folder, number, part)
            begins = part * PART_ROWS
            try:
                with clear_errors(file, storage):
                    table = pq.read_table(pa.BufferReader(storage.read(file)), schema=MANIFEST_SCHEMA)
            except pa.ArrowInvalid:
                table = MANIFEST_SCHEMA.empty_table()
            if len(table) != min(PART_ROWS, rows - begins):
                raise GladError(f"{file}: damaged; give --overwrite to list the archive anew")
            table = table.slice(max(0, low - begins), min(high, begins + PART_ROWS) - max(low, begins))
            column = table.schema.get_field_index("position")
            tables.append(table.set_column(column, "position", pc.add(table["position"], start)))
    return pa.concat_tables(tables)


def read_earlier(folders: Sequence[tuple[str, Sequence[int]]], storage: Storage) -> Earlier:
    """The images of earlier listings. Args and errors as of `read_manifest`, for each."""
    stretches = [
        (folder, listed, first, min(first + STRETCH, sum(listed)))
        for folder, listed in folders
        for first in range(0, sum(listed), STRETCH)
    ]

    def read(stretch: tuple[str, Sequence[int], int, int]) -> Earlier:
        return Earlier.of(read_manifest(*stretch, storage))

    with ThreadPoolExecutor(READERS) as pool:
        return Earlier.joined(list(pool.map(read, stretches)))


def _part(folder: str, number: int, part: int) -> str:
    """The file of a part: task ``number``'s rows from `PART_ROWS` times ``part`` on."""
    return join(folder, f"part-{number:02d}{part:06d}.parquet")
