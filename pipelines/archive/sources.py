"""What a user may name as SOURCE, turned into manifest rows: one per image, in a fixed order, streamed.

A folder tree, a glob, a dataset in MVTec-AD's or VisA's layout, a text, CSV or Parquet list of URIs, tars, a single
image; each local or on S3. ``image_id`` is a hash of the image's path within the archive, so a copied archive keeps its
ids. What is wrong with one entry is a row with an error; what is wrong with all of SOURCE is an exception.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePosixPath

from fsspec.utils import glob_translate

from cluster.locations import SCHEME, UNSPEAKABLE
from cluster.storage import IS_HIDDEN, Entry, Storage, StorageError, absolute, clear_errors, is_s3, join, spelled
from glad_core.decoding.picture import is_image
from glad_core.errors import GladError
from pipelines.archive.layouts import category_folders, choose_category, is_real_iad, split_folders
from pipelines.archive.mask_files import in_mask_folder, named_picture, plain
from pipelines.archive.rows import (
    HIDDEN,
    HIDDEN_FILES,
    MASKS,
    LeftOut,
    Row,
    Tar,
    error_row,
    file_rows,
    image_row,
    member_row,
    read_tar,
)
from pipelines.archive.split_file import read_split_file, split_file
from pipelines.archive.uri_list import LIST_SUFFIXES, read_list
from pipelines.archive.uris import image_id, one_line, path_of, printable, split_tar_uri

WILDCARDS = re.compile(r"[*?\[]")
# What lists are written in that no picture or tar is; read as a picture, each would be a broken one.
OTHER_LISTS = re.compile(
    r"\.(jsonl?|ndjson|xlsx?|ods|feather|arrow|orc|avro|pq|ya?ml|(csv|tsv|txt|lst|parquet)\.(gz|bz2|xz|zst|zip))$",
    re.IGNORECASE,
)
TARS = 4  # whose members are kept in memory, if a list names members one by one
LONGEST_ENTRY = 2**15  # characters of a list's entry; a path has 4096 bytes at most


@dataclass(frozen=True)
class Tree:
    """A folder, listed with all files below it.

    ``inside`` is put before their paths below the folder to make their paths within the archive.
    """

    folder: str
    inside: str = ""
    category: str | None = None


def list_source(
    source: str, category: str | None, storage: Storage, several: bool = False, left_out: LeftOut | None = None
) -> Iterator[Row]:
    """Manifest rows of any SOURCE.

    If the models are for ``several`` categories, ``category`` holds for every image of any SOURCE; without it an
    image's category is that of its dataset, or else the first folder below SOURCE.

    Raises:
        GladError: unknown category, several categories and none chosen, an unreadable list.
        StorageError: nothing there, no such bucket, wrong credentials.
    """
    source = absolute(source)
    left_out = LeftOut() if left_out is None else left_out
    trees = trees_of(source, category, storage, several)
    if trees is not None:
        rows: Iterator[Row] = (
            row
            for tree in trees
            for row in tree_rows(tree, storage.entries(tree.folder, hidden=True), storage, left_out)
        )
    elif storage.kind(source) == "folder":
        rows = _list_split_file(source, category, storage, several)
    elif category is not None and not several:
        raise GladError(f"{source}: --category chooses within a dataset's folder, and this is no folder; leave it out")
    else:
        rows = _list_no_folder(source, storage, left_out)
    return with_categories(rows, source, category, storage) if several else rows


def trees_of(source: str, category: str | None, storage: Storage, several: bool = False) -> list[Tree] | None:
    """The folder trees that make up an archive.

    None if ``source`` is no folder, or a dataset in VisA's layout, whose split file names its images. Raises as
    `list_source`.
    """
    if storage.kind(source) != "folder" or split_file(source, storage) is not None:
        return None
    folders = category_folders(source, storage)
    if category is None and source not in folders.values() and not _nothing_else(source, folders, storage):
        folders = {}  # no dataset as such, so every file is an image of the archive
    if several and (category is None or category in folders):
        chosen = list(folders) if category is None else [category]
    elif several:  # the category is a name for whatever is there
        chosen = _one_category(source, folders, None)
    else:
        chosen = _one_category(source, folders, category)
    # Ids count from the category's name on, so they are the same for the category's folder and for the one above it.
    trees = [
        Tree(test, f"{name}/{test.rpartition('/')[2]}/", printable(name))
        for name in chosen
        for test in split_folders(folders[name], "test", storage)
    ]
    return trees or [Tree(source)]


def advice_on(source: str, category: str | None, storage: Storage) -> str | None:
    """A line for users who get every file and may have meant a dataset's test images; None for all others."""
    if category is not None or storage.kind(source) != "folder" or split_file(source, storage) is not None:
        return None
    folders = category_folders(source, storage)
    if folders and source not in folders.values() and not _nothing_else(source, folders, storage):
        names = f"{', '.join(list(folders)[:3])}{', ...' if len(folders) > 3 else ''}"
        return (
            f"{source}: every file is scored, since other folders lie beside the categories of a dataset ({names}); "
            f"--category {next(iter(folders))} scores the test images of one"
        )
    if not folders and is_real_iad(source, storage):
        return f"{source}: every file is scored, its masks too, since Real-IAD's layout is not read"
    return None


def _nothing_else(source: str, folders: dict[str, str], storage: Storage) -> bool:
    """Whether a dataset's folder holds no other folders than its categories."""
    return all(name in folders or name.startswith(".") or HIDDEN.search(f"{name}/") for name in storage.folders(source))


def _one_category(source: str, folders: dict[str, str], category: str | None) -> list[str]:
    """The one MVTec-AD category to list, [] if ``source`` is not in that layout."""
    if source in folders.values():
        (own_name,) = folders
        if category not in (None, own_name):
            raise GladError(f"{source} is the category '{own_name}', not '{category}'; leave --category out")
        return [own_name]
    if folders:
        return [choose_category(folders, category, source)]
    if category is not None:
        raise GladError(f"{source}: no category in it, that is, a folder with train/ and test/; leave --category out")
    return []


def tree_rows(tree: Tree, files: Iterable[Entry], storage: Storage, left_out: LeftOut) -> Iterator[Row]:
    """Manifest rows of what is listed in a tree; its paths are relative to the tree's folder.

    Masks in a dataset's test set are left out, as `mask_files.part_masks` finds them.
    """

    @lru_cache(maxsize=1)
    def stems(folder: str) -> set[str]:
        place = tree.folder if folder == "." else join(tree.folder, folder)
        names = [PurePosixPath(entry.path) for entry in storage.level(place)]
        return {plain(name.stem) for name in names if is_image(name.name)}

    def is_mask(name: str) -> bool:
        path = PurePosixPath(name)
        bare = named_picture(path.stem) if is_image(name) else None
        return in_mask_folder(path) or (bare is not None and bare in stems(str(path.parent)))

    for file in files:
        path = tree.inside + file.path
        location = f"{tree.folder}/{file.path}" if file.path else tree.folder
        if file.problem == IS_HIDDEN:
            left_out.others[HIDDEN_FILES] += 1
        elif tree.category is not None and is_mask(file.path):
            left_out.others[MASKS] += 1
        elif file.problem is None:
            yield from file_rows(spelled(location), path, file, tree.category, storage, left_out)
        else:
            yield error_row(spelled(location), image_id(path), tree.category, "unreadable", file.problem)


def with_categories(rows: Iterable[Row], source: str, category: str | None, storage: Storage) -> Iterator[Row]:
    """The rows with the category that several models need.

    That is ``category``; else their own, of a dataset or a list; else the first folder inside their tar; else the
    first folder below SOURCE, of a glob below the part before its first wildcard.

    Raises:
        GladError: SOURCE is no folder or glob, and nothing says the category of one of its images.
    """
    base = None
    if storage.kind(source) == "folder":
        base = source
    elif storage.kind(source) == "none" and (wild := WILDCARDS.search(source)):
        base = source[: wild.start()].rpartition("/")[0]
    for row in rows:
        found = category or row["category"] or _first_folder(row, base)
        if found is None and base is None:
            raise GladError(
                f"{source}: nothing says of which category {row['uri']} is: add a column 'category' to the list, "
                "or --category"
            )
        yield row | {"category": found}


def _first_folder(row: Row, base: str | None) -> str | None:
    tar = row.get("shard")
    inside = [path_of(row["uri"])] if tar else []
    below = [path_of(tar or row["uri"]).removeprefix(base).strip("/")] if base is not None else []
    parts = [[name for name in path.split("/") if name not in ("", ".")] for path in inside + below]  # ./bolt/1.png
    return next((printable(part[0]) for part in parts if len(part) > 1), None)


def _list_no_folder(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Row]:
    if storage.kind(source) == "file":
        if PurePosixPath(source).suffix.lower() in LIST_SUFFIXES:
            return _list_uris(source, storage, left_out)
        if OTHER_LISTS.search(source):
            raise GladError(f"{source}: not read; write the list as text, CSV or Parquet ({', '.join(LIST_SUFFIXES)})")
        with clear_errors(source, storage):
            return tree_rows(Tree(source.rpartition("/")[0]), [storage.entry(source)], storage, left_out)
    if WILDCARDS.search(source):
        return _list_glob(source, storage, left_out)
    raise StorageError(f"{source}: no such file or folder")


def _list_split_file(source: str, category: str | None, storage: Storage, several: bool) -> Iterator[Row]:
    """The test images of a dataset in VisA's layout; ids are as if the folder had been walked."""
    examples = [example for example in read_split_file(source, storage) or [] if example.split == "test"]
    known = list(dict.fromkeys(example.category for example in examples))
    if known and not several:
        known = [choose_category(known, category, source)]
    elif category in known:
        known = [category]
    for example in examples:
        if example.category in known:
            row = image_row(spelled(absolute(example.uri)), image_id(example.path), example.category)
            yield from (dict(row) for _ in range(example.rows))  # repeated ones are counted where all rows are


def _list_glob(pattern: str, storage: Storage, left_out: LeftOut) -> Iterator[Row]:
    fixed = pattern[: WILDCARDS.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if is_s3(pattern) and len(fixed) <= len("s3://"):
        raise GladError(f"{pattern}: the bucket itself cannot be a pattern; name it")
    below = pattern[len(fixed) + 1 :]
    matches = re.compile(glob_translate(below)).match
    files = (
        file
        for file in storage.entries(fixed or "/", hidden=True)
        if matches(file.path) or (file.size is None and _may_lead_to(file.path, below))
    )
    return tree_rows(Tree(fixed), files, storage, left_out)


def _may_lead_to(folder: str, pattern: str) -> bool:
    """Whether a folder that could not be listed may hold files that match."""
    names, parts = folder.split("/") if folder else [], pattern.split("/")
    for name, part in zip(names, parts, strict=False):
        if "**" in part:
            return True
        if not fnmatchcase(name, part):
            return False
    return len(names) < len(parts)


def _list_uris(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Row]:
    """A list's entries in its order; relative ones count from the list's own folder, ids from the entry as written.

    A tar's member that is named by its URI has the id that it has if the entry names its tar.
    """
    parent = source.rpartition("/")[0]
    tar: Callable[[str], Tar] = lru_cache(TARS)(lambda uri: read_tar(uri, Entry(uri, None, None), storage))
    for entry, category in read_list(source, storage, left_out):
        member, file = split_tar_uri(entry) or (None, entry)
        try:
            uri = _uri_of(file, parent, storage)
        except StorageError as error:
            yield error_row(one_line(entry), image_id(entry), category, "unreadable", str(error))
            continue
        if uri is None:
            message = "not UTF-8, and no file has a name of these bytes"
            yield error_row(one_line(entry), image_id(entry), category, "missing", message)
        elif member is not None:
            yield member_row(member, uri, file, tar(uri)) | {"category": category}
        else:
            yield from file_rows(uri, entry, Entry(entry, None, None), category, storage, left_out)


def _uri_of(entry: str, parent: str, storage: Storage) -> str | None:
    """The URI of a list's entry; None if it is not UTF-8 and no local file is named by its bytes.

    Raises:
        StorageError: it cannot be a location.
    """
    if len(entry) > LONGEST_ENTRY:
        raise StorageError(f"{len(entry)} characters are no location")
    uri = entry if SCHEME.match(entry) or entry.startswith("/") else join(parent, entry)
    location = absolute(uri)
    if not UNSPEAKABLE.search(uri):
        return uri
    if printable(location) != location and storage.kind(location) == "none":
        return None
    return spelled(location)
