"""The archive listed once, by many tasks, into a manifest.

Each task gets a piece of the archive (`pieces`), writes its rows in parts (`manifest`) and returns their number. These
numbers, kept in plan.json, give every image its position in the whole. The order is that of a single walk, however many
tasks run at a time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from cluster import session
from cluster.storage import Storage, StorageError, UnorderedError, absolute, join, spelled
from glad_core.errors import GladError
from pipelines.archive import manifest
from pipelines.archive.earlier import Earlier, key_of, new_rows
from pipelines.archive.pieces import Archive, Part, files_of, split
from pipelines.archive.rows import OUTSIDE, LeftOut, Row
from pipelines.archive.sources import advice_on, list_source, tree_rows, trees_of, with_categories
from pipelines.archive.uri_list import LIST_SUFFIXES

ID_BYTES = 16  # of an image_id, which is their hexadecimal form
TASK_CPUS = 0.25  # of a listing or decoding task, which waits on storage most of the time


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
    remembering: Any = ray.remote(num_cpus=TASK_CPUS)(manifest.read_earlier)
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
        batch = list(islice(rows, manifest.PART_ROWS))
        if not batch:
            break
        for position, row in enumerate(batch, part * manifest.PART_ROWS):
            row["position"] = position
            errors += row.get("error_type") is not None
            unknown += bool(archive.known) and row.get("error_type") is None and row["category"] not in archive.known
        ids += bytes.fromhex("".join([row["image_id"] for row in batch]))
        manifest.write_part(folder, number, part, batch, archive.storage)
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
    storage = archive.storage
    rows = (row for part in piece for row in tree_rows(part[0], files_of(part, storage), storage, left_out))
    return with_categories(rows, archive.source, archive.category, storage) if archive.several else rows


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
