"""The archive as a manifest in Parquet: listed once by many tasks, read again stretch by stretch.

A folder tree is opened level by level until there are enough folders. Consecutive folders, and the files between them,
then form one task each; a large flat prefix on S3 is cut into ranges of its keys. A task writes its rows in parts of
`PART_ROWS` and returns their number. These numbers, kept in plan.json, give every image its position in the whole. The
order is that of a single walk, however many tasks run at a time.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import session
from cluster.storage import Entry, Storage, StorageError, UnorderedError, absolute, clear_errors, is_s3, join, spelled
from glad_core.errors import GladError
from pipelines.archive.earlier import Earlier, key_of, new_rows
from pipelines.archive.key_ranges import cut
from pipelines.archive.rows import OUTSIDE, LeftOut, Row
from pipelines.archive.sources import Tree, advice_on, list_source, tree_rows, trees_of, with_categories
from pipelines.archive.uri_list import LIST_SUFFIXES

PART_ROWS = 512  # rows per manifest file
REPEATING = ["category", "shard", "stage", "error_type", "message"]  # columns whose values come again
ID_BYTES = 16  # of an image_id, which is their hexadecimal form
FOLDERS = 64  # a tree is opened until it has this many folders, and cut into at most this many tasks
LOOSE_FILES = 1000  # directly in a folder (a page of S3's listing); a folder with more is not opened
PAGES = 10  # of `LOOSE_FILES` each; a folder on S3 with more is cut into ranges of keys
OPENERS = 16  # folders opened, or parts of a manifest read, at a time
STRETCH = 16 * PART_ROWS  # rows of a manifest that are read in one go
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
# A file: path below the tree's folder, size, version and problem, as in an `Entry`. A folder has no size; instead of
# version and problem, the key below it after which it is listed, and the last one (S3 only; None: no bound). A plain
# tuple is sent to a task in a seventh of the time of a named one.
Part = tuple[Tree, str, int | None, str | None, str | None]


@dataclass(frozen=True)
class Archive:
    """The arguments of `sources.list_source`; ``source`` is absolute. ``known`` are the models' categories."""

    source: str
    category: str | None
    storage: Storage
    several: bool
    known: tuple[str, ...] = ()


class Counts(NamedTuple):
    """What a listing task wrote and left out; see `rows.LeftOut`.

    Of the rows, ``unknown`` are images of a category without a model, and ``errors`` cannot be read. ``judged``: see
    `rows.LeftOut`.
    """

    rows: int
    duplicates: int
    blank: int
    others: dict[str, int]
    unknown: int
    errors: int
    judged: int


@dataclass(frozen=True)
class Listed:
    """Number of images from each task, in the manifest's order, and of what was left out.

    ``judged``: number of images that earlier listings have and that are still there.
    """

    rows: tuple[int, ...]
    duplicates: int
    blank: int
    left_out: dict[str, int]
    judged: int = 0


def list_remotely(
    source: str,
    category: str | None,
    storage: Storage,
    folder: str,
    several: bool,
    known: Iterable[str] = (),
    earlier: Sequence[tuple[str, Sequence[int]]] = (),
) -> Listed:
    """List an archive into ``folder`` by tasks on the cluster; only folders and counts reach the driver.

    Args:
        known: the categories of the models, if there are several.
        earlier: folders of earlier listings and the number of rows from each of their tasks. Their images are left out,
            and there need be no others.

    Raises:
        GladError, StorageError: as `sources.list_source`; also if there is no image, or none of a known category.
    """
    archive = Archive(absolute(source), category, storage, several, tuple(known))
    try:
        return _list_pieces(archive, folder, earlier)
    except UnorderedError as error:  # no S3 by the book; it lists all keys once if nobody asks for a range of them
        print(f"{error}, which is not S3's order: every folder is listed by one task", file=sys.stderr, flush=True)
        return _list_pieces(archive, folder, earlier, in_ranges=False)


def _list_pieces(
    archive: Archive, folder: str, earlier: Sequence[tuple[str, Sequence[int]]], in_ranges: bool = True
) -> Listed:
    import ray

    opening: Any = ray.remote(num_cpus=TASK_CPUS)(split)
    listing: Any = ray.remote(num_cpus=TASK_CPUS, num_returns=2)(write_manifest)
    counting: Any = ray.remote(num_cpus=TASK_CPUS, num_returns=2)(_beside)
    checking: Any = ray.remote(num_cpus=TASK_CPUS)(count_repeated)
    remembering: Any = ray.remote(num_cpus=TASK_CPUS)(read_earlier)
    tasks: list[Any] = []
    try:
        pieces = ray.get(opening.remote(archive, in_ranges))
        outside, advice = counting.remote(archive)
        before = remembering.remote(earlier, archive.storage) if earlier else None
        tasks = [listing.remote(archive, piece, number, folder, before) for number, piece in enumerate(pieces)]
        counts: list[Counts] = ray.get([task for task, _ in tasks])
        others = Counter({OUTSIDE: ray.get(outside)})
        repeated = ray.get(checking.remote(*[ids for _, ids in tasks]))
    except BaseException as error:
        counted = [task for task, _ in tasks]
        for task in counted:
            ray.cancel(task)
        if counted:  # they must not write any more once the caller cleans up
            ray.wait(counted, num_returns=len(counted), timeout=30)
        if isinstance(error, ray.exceptions.RayError):
            raise session.root_cause(error, GladError, StorageError) from None
        raise
    _check_counts(archive, counts, repeated, bool(earlier))
    if line := ray.get(advice):
        print(line, file=sys.stderr, flush=True)
    for count in counts:
        others.update(count.others)
    return Listed(
        rows=tuple(count.rows for count in counts),
        duplicates=sum(count.duplicates for count in counts),
        blank=sum(count.blank for count in counts),
        left_out={reason: number for reason, number in others.items() if number},
        judged=sum(count.judged for count in counts),
    )


def _check_counts(archive: Archive, counts: Sequence[Counts], repeated: int, again: bool) -> None:
    """Raise a GladError if there is nothing to judge, or if a file was listed twice.

    Args:
        again: the archive was listed before, so that it holds images for which there are models.
    """
    source = archive.source
    rows, unknown, errors = (sum(getattr(count, name) for count in counts) for name in ("rows", "unknown", "errors"))
    if not rows + sum(count.judged for count in counts):
        raise GladError(f"{source}: no images in it; name a folder, glob, list or tar that holds some")
    if unknown and unknown + errors == rows and not again:
        raise GladError(
            f"{source}: no image is of a category that --model knows ({', '.join(archive.known)}); "
            "put them into folders of these names, or give --category"
        )
    if repeated:  # every path has an id of its own, so a path was listed twice
        raise GladError(
            f"{source}: {repeated} files were listed twice; give the same command again when nobody writes there"
        )


def read_earlier(folders: Sequence[tuple[str, Sequence[int]]], storage: Storage) -> Earlier:
    """The images of earlier listings. Args and errors as of `read_manifest`, for each."""
    stretches = [
        (folder, listed, first, min(first + STRETCH, sum(listed)))
        for folder, listed in folders
        for first in range(0, sum(listed), STRETCH)
    ]

    def read(stretch: tuple[str, Sequence[int], int, int]) -> Earlier:
        return Earlier.of(read_manifest(*stretch, storage))

    with ThreadPoolExecutor(OPENERS) as pool:
        return Earlier.joined(list(pool.map(read, stretches)))


def split(archive: Archive, in_ranges: bool = True) -> list[list[Part] | None]:
    """The archive in pieces for one task each, in order; a single None if it cannot be split into folders.

    Args:
        in_ranges: cut large flat prefixes on S3 into ranges of keys.
    """
    trees = trees_of(archive.source, archive.category, archive.storage, archive.several)
    if trees is None:
        return [None]
    parts: list[Part] = [(tree, "", None, None, None) for tree in trees]
    whole: set[Part] = set()
    with ThreadPoolExecutor(OPENERS) as pool:
        while True:
            closed = [part for part in parts if part[2] is None and part not in whole]
            if not closed or sum(part[2] is None for part in parts) >= FOLDERS:
                break
            opened = dict(zip(closed, pool.map(lambda part: _open(part, archive.storage), closed), strict=True))
            whole.update(part for part in closed if opened[part] == [part])
            parts = [below for part in parts for below in (opened.get(part, (part,)) if part[2] is None else (part,))]
    if in_ranges:
        parts = _in_ranges(parts, whole, archive.storage)
    folders_per_piece = -(-max(1, sum(part[2] is None for part in parts)) // FOLDERS)
    pieces: list[list[Part] | None] = []
    piece: list[Part] = []
    folders = 0
    for part in parts:
        if part[2] is None and folders == folders_per_piece:
            pieces.append(piece)
            piece, folders = [], 0
        folders += part[2] is None
        piece.append(part)
    return [*pieces, piece]


def _beside(archive: Archive) -> tuple[int, str | None]:
    return count_outside(archive), advice_on(archive.source, archive.category, archive.storage)


def count_outside(archive: Archive) -> int:
    """Files below a dataset's folder that are not listed, since they lie outside of the test sets that are."""
    source, storage = archive.source, archive.storage
    if storage.kind(source) != "folder":
        return 0
    trees = trees_of(source, archive.category, storage, archive.several)
    if trees is None:
        listed = {row["uri"] for row in list_source(source, archive.category, storage, archive.several)}
        return sum(spelled(join(source, file.path)) not in listed for file in storage.entries(source, hidden=True))
    if any(tree.folder == source for tree in trees):
        return 0
    tests = tuple(f"{tree.folder.removeprefix(source).strip('/')}/" for tree in trees)
    return sum(not file.path.startswith(tests) for file in storage.entries(source, hidden=True))


def _in_ranges(parts: list[Part], flat: set[Part], storage: Storage) -> list[Part]:
    """The parts, with the large ones of the ``flat`` folders on S3 in ranges of keys, `FOLDERS` in all."""
    cuttable = [part for part in parts if part in flat and is_s3(part[0].folder)]
    if not cuttable:
        return parts
    ranges = 1 + (FOLDERS - sum(part[2] is None for part in parts)) // len(cuttable)

    def pieces(part: Part) -> list[Part]:
        found = cut(_below(*part[:2])[0], storage, ranges, PAGES * LOOSE_FILES)
        return [(*part[:3], after, last) for after, last in found]

    with ThreadPoolExecutor(OPENERS) as pool:
        by_range = dict(zip(cuttable, pool.map(pieces, cuttable), strict=True))
    return [piece for part in parts for piece in by_range.get(part, [part])]


def _open(closed: Part, storage: Storage) -> list[Part]:
    """The files and folders directly in a folder; the folder itself if it holds many files or cannot be opened."""
    tree, folder = closed[:2]
    location, prefix = _below(tree, folder)
    parts: list[Part] = []
    files = 0
    try:
        for entry in storage.level(location, prefix):
            files += entry.size is not None
            # An S3 key may hold two slashes in a row: the path between them names nothing.
            if files > LOOSE_FILES or entry.path == prefix:
                return [closed]
            parts.append((tree, *entry))
    except StorageError:
        if is_s3(location):
            raise
        return [closed]  # the task that lists it says why
    return parts


def _below(tree: Tree, folder: str) -> tuple[str, str]:
    """The location of a folder, and what comes before the names in it to make paths below the tree's folder."""
    return (join(tree.folder, folder), f"{folder}/") if folder else (tree.folder, "")


def write_manifest(
    archive: Archive, piece: Sequence[Part] | None, number: int, folder: str, earlier: Earlier | None = None
) -> tuple[Counts, np.ndarray]:
    """List a piece of the archive (None: all of it) into Parquet parts; returns counts, and the ids as bytes [N].

    Holds one part in memory and 16 bytes for each image. Paths in a tree cannot repeat; to skip what a list or a split
    file names twice, it keeps all their ids.
    """
    left_out = LeftOut()
    if piece is None:
        rows = list_source(archive.source, archive.category, archive.storage, archive.several, left_out)
        has_split_file = archive.storage.kind(archive.source) == "folder"  # any other folder is cut into pieces
        if has_split_file or PurePosixPath(archive.source).suffix.lower() in LIST_SUFFIXES:
            rows = _unique(rows, left_out)
    else:
        rows = _piece_rows(piece, archive, left_out)
    if earlier is not None:
        rows = new_rows(rows, earlier, archive.storage, left_out)
    ids = bytearray()
    unknown = errors = 0
    for part in range(10**6):
        batch = list(islice(rows, PART_ROWS))
        if not batch:
            break
        for position, row in enumerate(batch, part * PART_ROWS):
            row["position"] = position
            errors += row.get("error_type") is not None
            unknown += bool(archive.known) and row.get("error_type") is None and row["category"] not in archive.known
        ids += bytes.fromhex("".join([row["image_id"] for row in batch]))
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(batch, schema=MANIFEST_SCHEMA), stream, use_dictionary=REPEATING)
        archive.storage.write(_part(folder, number, part), stream.getvalue())
    counts = Counts(
        rows=len(ids) // ID_BYTES,
        duplicates=left_out.duplicates,
        blank=left_out.blank,
        others=dict(left_out.others),
        unknown=unknown,
        errors=errors,
        judged=left_out.judged,
    )
    return counts, np.frombuffer(bytes(ids), f"S{ID_BYTES}")


def _piece_rows(piece: Sequence[Part], archive: Archive, left_out: LeftOut) -> Iterator[Row]:
    def files(part: Part) -> Iterable[Entry]:
        if part[2] is not None:
            return (Entry(*part[1:]),)
        location, prefix = _below(*part[:2])
        return archive.storage.entries(location, prefix=prefix, after=part[3], last=part[4], hidden=True)

    rows = (row for part in piece for row in tree_rows(part[0], files(part), archive.storage, left_out))
    return with_categories(rows, archive.source, archive.category, archive.storage) if archive.several else rows


def _unique(rows: Iterable[Row], left_out: LeftOut) -> Iterator[Row]:
    """The rows without those of images that were named before, in whichever spelling."""
    seen: set[bytes] = set()
    for row in rows:
        key = key_of(row)
        if key in seen:
            left_out.duplicates += 1
            continue
        seen.add(key)
        yield row


def count_repeated(*ids: np.ndarray) -> int:
    """Number of images whose id an earlier one has, whichever task listed them."""
    every = np.concatenate(ids)
    halves = np.sort(every.view("u8")[::2])  # numbers are sorted in a tenth of the time
    if not np.any(halves[1:] == halves[:-1]):
        return 0
    every.sort()
    return int(np.count_nonzero(every[1:] == every[:-1]))


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


def _part(folder: str, number: int, part: int) -> str:
    """The file of a part: task ``number``'s rows from `PART_ROWS` times ``part`` on."""
    return join(folder, f"part-{number:02d}{part:06d}.parquet")
