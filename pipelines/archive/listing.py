"""The archive as a manifest in Parquet: listed once by many tasks, read again stretch by stretch.

A folder tree is opened level by level until there are enough folders. Consecutive folders, and the files between them,
then form one task each. A task writes its rows in parts of `PART_ROWS` and returns their number. These numbers, kept in
plan.json, give every image its position in the whole. The order is that of a single walk, however many tasks run at a
time.
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
from cluster.storage import Entry, Storage, StorageError, absolute, clear_errors, join
from glad_core.errors import GladError
from pipelines.archive.sources import LIST_SUFFIXES, Row, Tree, list_source, tree_rows, trees_of, with_categories

PART_ROWS = 512  # rows per manifest file
FOLDERS = 64  # a tree is opened until it has this many folders, and cut into at most this many tasks
LOOSE_FILES = 1000  # directly in a folder (a page of S3's listing); a folder with more is not opened
OPENERS = 16  # folders opened at a time
TASK_CPUS = 0.25  # of a listing or decoding task, which waits on storage most of the time

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
Part = tuple[Tree, Entry]  # a file or folder, its path relative to the tree's folder


@dataclass(frozen=True)
class Archive:
    """The arguments of `sources.list_source`; ``source`` is absolute."""

    source: str
    category: str | None
    storage: Storage
    several: bool


@dataclass(frozen=True)
class Listed:
    """Number of images from each task, in the manifest's order, and of entries that named an image a second time."""

    rows: tuple[int, ...]
    duplicates: int


def list_remotely(source: str, category: str | None, storage: Storage, folder: str, several: bool) -> Listed:
    """List an archive into ``folder`` by tasks on the cluster; only folders and counts reach the driver.

    Raises:
        GladError, StorageError: as `sources.list_source`; also if there is no image.
    """
    import ray

    archive = Archive(absolute(source), category, storage, several)
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
        if tasks:  # they must not write any more once the caller cleans up
            ray.wait(tasks, num_returns=len(tasks), timeout=30)
        if isinstance(error, ray.exceptions.RayError):
            raise session.root_cause(error, GladError, StorageError) from None
        raise
    listed = Listed(tuple(rows for rows, _ in counts), sum(duplicates for _, duplicates in counts))
    if not sum(listed.rows):
        raise GladError(f"{source}: no images in it; name a folder, glob, list or tar that holds some")
    return listed


def split(archive: Archive) -> list[list[Part] | None]:
    """The archive in pieces for one task each, in order; a single None if it cannot be split into folders."""
    trees = trees_of(archive.source, archive.category, archive.storage, archive.several)
    if trees is None:
        return [None]
    parts: list[Part] = [(tree, Entry("", None, None)) for tree in trees]
    whole: set[Part] = set()
    with ThreadPoolExecutor(OPENERS) as pool:
        while True:
            closed = [part for part in parts if part[1].size is None and part not in whole]
            if not closed or sum(entry.size is None for _, entry in parts) >= FOLDERS:
                break
            opened = dict(zip(closed, pool.map(lambda part: _open(part, archive.storage), closed), strict=True))
            whole.update(part for part in closed if opened[part] == [part])
            parts = [below for part in parts for below in opened.get(part, [part])]
    folders_per_piece = -(-max(1, sum(entry.size is None for _, entry in parts)) // FOLDERS)
    pieces: list[list[Part] | None] = []
    piece: list[Part] = []
    folders = 0
    for part in parts:
        if part[1].size is None and folders == folders_per_piece:
            pieces.append(piece)
            piece, folders = [], 0
        folders += part[1].size is None
        piece.append(part)
    return [*pieces, piece]


def _open(closed: Part, storage: Storage) -> list[Part]:
    """The files and folders directly in a folder; the folder itself if it holds many files."""
    tree, folder = closed
    parts: list[Part] = []
    files = 0
    for entry in storage.level(join(tree.folder, folder.path) if folder.path else tree.folder):
        files += entry.size is not None
        if files > LOOSE_FILES or not entry.path:  # an S3 key may hold two slashes in a row, which no path can name
            return [closed]
        parts.append((tree, entry._replace(path=f"{folder.path}/{entry.path}") if folder.path else entry))
    return parts


def write_manifest(archive: Archive, piece: Sequence[Part] | None, number: int, folder: str) -> tuple[int, int]:
    """List a piece of the archive (None: all of it) into Parquet parts; returns the number of images and of duplicates.

    Holds one part in memory. Paths in a tree cannot repeat. To skip what a list, a split file or a tar names twice, it
    keeps 16 bytes for each image.
    """
    if piece is None:
        rows = list_source(archive.source, archive.category, archive.storage, archive.several)
        has_split_file = archive.storage.kind(archive.source) == "folder"  # any other folder is cut into pieces
        whole = has_split_file or PurePosixPath(archive.source).suffix.lower() in LIST_SUFFIXES
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
        batch = [row | {"position": count + index} for index, row in enumerate(islice(unique, PART_ROWS))]
        if not batch:
            break
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(batch, schema=MANIFEST_SCHEMA), stream)
        archive.storage.write(_part(folder, number, part), stream.getvalue())
        count += len(batch)
    return count, seen - count


def _piece_rows(piece: Sequence[Part], archive: Archive) -> Iterator[Row]:
    def files(tree: Tree, entry: Entry) -> Iterator[Entry]:
        if entry.size is not None:
            yield entry
            return
        inside = f"{entry.path}/" if entry.path else ""
        for file in archive.storage.entries(join(tree.folder, entry.path) if entry.path else tree.folder):
            yield file._replace(path=inside + file.path)

    rows = (row for part in piece for row in tree_rows(part[0], files(*part), archive.storage))
    return with_categories(rows, archive.source, archive.category) if archive.several else rows


def _unique(rows: Iterable[Row], whole: bool) -> Iterator[Row]:
    """The rows without those of images named before: anywhere (``whole``), or only in the same tar."""
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
    """The manifest's rows from position ``first`` to before ``last``; their ``position`` is that in the whole.

    Args:
        listed: number of rows from each listing task.

    Raises:
        StorageError: a part is missing or cannot be read.
    """
    tables = []
    for number, (end, rows) in enumerate(zip(accumulate(listed), listed, strict=True)):
        start = end - rows
        low, high = max(first, start) - start, min(last, end) - start
        for part in range(low // PART_ROWS, -(-high // PART_ROWS) if low < high else 0):
            file = _part(folder, number, part)
            with clear_errors(file, storage):
                table = pq.read_table(pa.BufferReader(storage.read(file)), schema=MANIFEST_SCHEMA)
            begins = part * PART_ROWS
            table = table.slice(max(0, low - begins), min(high, begins + PART_ROWS) - max(low, begins))
            column = table.schema.get_field_index("position")
            tables.append(table.set_column(column, "position", pc.add(table["position"], start)))
    return pa.concat_tables(tables)


def _part(folder: str, number: int, part: int) -> str:
    """The file of a part: task ``number``'s rows from `PART_ROWS` times ``part`` on."""
    return join(folder, f"part-{number:02d}{part:06d}.parquet")
