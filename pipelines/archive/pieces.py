"""An archive in pieces of one listing task each.

A folder tree is opened level by level until there are enough folders. Consecutive folders, and the files between them,
then form one piece; a large flat prefix on S3 is cut into ranges of its keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.storage import Entry, Storage, StorageError, is_s3, join
from pipelines.archive.key_ranges import cut
from pipelines.archive.sources import Tree, trees_of

FOLDERS = 64  # a tree is opened until it has this many folders, and cut into at most this many tasks
LOOSE_FILES = 1000  # directly in a folder (a page of S3's listing); a folder with more is not opened
PAGES = 10  # of `LOOSE_FILES` each; a folder on S3 with more is cut into ranges of keys
OPENERS = 16  # folders opened at a time

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


def files_of(part: Part, storage: Storage) -> Iterable[Entry]:
    """The files of a part, hidden ones too.

    Raises:
        StorageError: its folder cannot be listed.
    """
    if part[2] is not None:
        return (Entry(*part[1:]),)
    location, prefix = _below(*part[:2])
    return storage.entries(location, prefix=prefix, after=part[3], last=part[4], hidden=True)


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
