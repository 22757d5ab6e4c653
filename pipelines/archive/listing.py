"""The archive as a manifest in Parquet: listed once by many tasks, read again stretch by stretch.

A folder tree is opened level by level until there are enough folders; then consecutive folders, and the files between
them, are one task's each. A task writes its rows in parts of `PART_ROWS` and says how many there were; the tasks'
counts, kept in plan.json, give every image its position in the whole. The order is that of a single walk, however
many tasks run at a time.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import session
from cluster.storage import Storage, StorageError, clear_errors, is_s3, join, local_path
from glad_core.errors import GladError
from pipelines.archive.sources import LIST_SUFFIXES, Row, Tree, list_source, tree_rows, trees_of, with_categories

PART_ROWS = 512  # rows per manifest file
FOLDERS = 64  # a tree is opened until it has so many folders, and cut into at most so many tasks
LOOSE = 1000  # files beside each other (a page of S3's listing): a folder with more of them is not opened
OPENERS = 16  # folders opened at a time
TASK_CPUS = 0.25  # it waits on storage most of the time

MANIFEST_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("size", pa.int64()),  # bytes; null where the list does not say
        ("category", pa.string()),
        ("shard", pa.string()),  # the tar file an image lies in, and where in it
        ("offset", pa.int64()),
        ("stage", pa.string()),  # set where listing itself failed
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("position", pa.int64()),  # place among the rows of its task, from 0
    ]
)
Entry = tuple[Tree, str, int | None]  # a path below a tree's folder, and the file's size; None for a folder


@dataclass(frozen=True)
class Archive:
    """What is listed, as `sources.list_source` takes it."""

    source: str
    category: str | None
    storage: Storage
    several: bool


@dataclass(frozen=True)
class Listed:
    """How many images each task has listed, in the manifest's order; ``duplicates`` named an image listed already."""

    rows: tuple[int, ...]
    duplicates: int


def list_remotely(source: str, category: str | None, storage: Storage, folder: str, several: bool) -> Listed:
    """List an archive into ``folder`` by tasks on the cluster; the driver sees folders and counts.

    Raises:
        GladError, StorageError: see `sources.list_source`; also when there is nothing to score.
    """
    import ray

    archive = Archive(source if is_s3(source) else local_path(source), category, storage, several)
    opening: Any = ray.remote(num_cpus=TASK_CPUS)(split)
    listing: Any = ray.remote(num_cpus=TASK_CPUS)(write_manifest)
    tasks: list[Any] = []
    try:
        pieces = ray.get(opening.remote(archive))
        tasks = [listing.remote(archive, piece, number, folder) for number, piece in enumerate(pieces)]
        counts: list[tuple[int, int]] = ray.get(tasks)
    except BaseException as error:
        for task in tasks:
            ray.cancel(task)
        if tasks:  # nothing may be written any more once the caller cleans up
            ray.wait(tasks, num_returns=len(tasks), timeout=30)
        if isinstance(error, ray.exceptions.RayError):
            raise session.root_cause(error, GladError, StorageError) from None
        raise
    listed = Listed(tuple(rows for rows, _ in counts), sum(duplicates for _, duplicates in counts))
    if not sum(listed.rows):
        raise GladError(f"{source}: no images in it; name a folder, glob, list or tar that holds some")
    return listed


def split(archive: Archive) -> list[list[Entry] | None]:
    """The archive in pieces for one task each, in order; a single None where it is no folder."""
    trees = trees_of(archive.source, archive.category, archive.storage, archive.several)
    if trees is None:
        return [None]
    entries: list[Entry] = [(tree, "", None) for tree in trees]
    whole: set[Entry] = set()
    with ThreadPoolExecutor(OPENERS) as pool:
        while True:
            closed = [entry for entry in entries if entry[2] is None and entry not in whole]
            if not closed or sum(size is None for _, _, size in entries) >= FOLDERS:
                break
            opened = dict(zip(closed, pool.map(lambda entry: _open(entry, archive.storage), closed), strict=True))
            whole.update(entry for entry in closed if opened[entry] == [entry])
            entries = [part for entry in entries for part in opened.get(entry, [entry])]
    each = -(-max(1, sum(size is None for _, _, size in entries)) // FOLDERS)
    pieces: list[list[Entry] | None] = []
    piece: list[Entry] = []
    folders = 0
    for entry in entries:
        if entry[2] is None and folders == each:
            pieces.append(piece)
            piece, folders = [], 0
        folders += entry[2] is None
        piece.append(entry)
    return [*pieces, piece]


def _open(folder: Entry, storage: Storage) -> list[Entry]:
    """What lies directly in a folder; the folder itself where that is many files."""
    tree, path, _ = folder
    found: list[Entry] = []
    files = 0
    for name, size in storage.level(join(tree.folder, path) if path else tree.folder):
        files += size is not None
        if files > LOOSE or not name:  # an S3 key may hold two slashes in a row, which no path can name
            return [folder]
        found.append((tree, f"{path}/{name}" if path else name, size))
    return found


def write_manifest(archive: Archive, piece: Sequence[Entry] | None, number: int, folder: str) -> tuple[int, int]:
    """List a piece of the archive (None: all of it) into Parquet parts; returns how many images, and duplicates.

    Holds one part in memory. Paths in a tree cannot repeat; to find what a list or a tar names twice, 16 bytes are
    kept for each of its images.
    """
    if piece is None:
        rows = list_source(archive.source, archive.category, archive.storage, archive.several)
        whole = PurePosixPath(archive.source).suffix.lower() in LIST_SUFFIXES
    else:
        rows, whole = _piece_rows(piece, archive), False
    count, seen = 0, 0

    def counted() -> Iterator[Row]:
        nonlocal count, seen
        for row in rows:
            seen += 1
            yield row

    unique = _unique(counted(), whole)
    for part in range(10**6):
        batch = [row | {"position": count + place} for place, row in enumerate(islice(unique, PART_ROWS))]
        if not batch:
            break
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(batch, schema=MANIFEST_SCHEMA), stream)
        archive.storage.write(_part(folder, number, part), stream.getvalue())
        count += len(batch)
    return count, seen - count


def _piece_rows(piece: Sequence[Entry], archive: Archive) -> Iterator[Row]:
    def files(tree: Tree, path: str, size: int | None) -> Iterator[tuple[str, int]]:
        if size is not None:
            yield path, size
            return
        inside = f"{path}/" if path else ""
        for name, bytes_ in archive.storage.walk(join(tree.folder, path) if path else tree.folder):
            yield inside + name, bytes_

    rows = (row for entry in piece for row in tree_rows(entry[0], files(*entry), archive.storage))
    return with_categories(rows, archive.source, archive.category) if archive.several else rows


def _unique(rows: Iterable[Row], whole: bool) -> Iterator[Row]:
    """Without images named before: anywhere, or only in the same tar."""
    seen: set[bytes] = set()
    shard = None
    for row in rows:
        if not whole and row.get("shard") != shard:
            seen.clear()
            shard = row.get("shard")
        if whole or shard is not None:
            key = bytes.fromhex(row["image_id"])
            if key in seen:
                continue
            seen.add(key)
        yield row


def read_manifest(folder: str, listed: Sequence[int], first: int, last: int, storage: Storage) -> pa.Table:
    """The manifest's rows at positions ``first`` to ``last`` (not included), their ``position`` that in the whole.

    Args:
        listed: how many rows each task has listed.

    Raises:
        StorageError: a part is missing or cannot be read.
    """
    tables = []
    for number, (end, rows) in enumerate(zip(accumulate(listed), listed, strict=True)):
        start = end - rows
        low, high = max(first, start) - start, min(last, end) - start
        for part in range(low // PART_ROWS, -(-high // PART_ROWS) if low < high else 0):
            place = _part(folder, number, part)
            with clear_errors(place, storage):
                table = pq.read_table(pa.BufferReader(storage.read(place)), schema=MANIFEST_SCHEMA)
            begins = part * PART_ROWS
            table = table.slice(max(0, low - begins), min(high, begins + PART_ROWS) - max(low, begins))
            column = table.schema.get_field_index("position")
            tables.append(table.set_column(column, "position", pc.add(table["position"], start)))
    return pa.concat_tables(tables)


def _part(folder: str, number: int, part: int) -> str:
    """Where rows of task ``number`` from `PART_ROWS` times ``part`` on are."""
    return join(folder, f"part-{number:02d}{part:06d}.parquet")
