"""What a user may name as SOURCE, turned into manifest rows: one per image, in a fixed order, streamed.

A folder tree, a glob, a dataset in MVTec-AD's or VisA's layout, a text or Parquet list of URIs, tar shards, a single
image; each local or on S3. ``image_id`` is a hash of the image's path within the archive, so a copied archive keeps its
ids.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from cluster.storage import Entry, Storage, StorageError, absolute, clear_errors, is_s3, join
from glad_core.errors import GladError
from pipelines.archive.layouts import category_folders, choose_category, read_split_file, split_file
from pipelines.archive.picture import is_image

LIST_SUFFIXES = {".txt", ".lst", ".parquet"}
WILDCARDS = re.compile(r"[*?\[]")
Row = dict[str, Any]


@dataclass(frozen=True)
class Tree:
    """A folder, listed with all files below it.

    ``inside`` is put before their paths below the folder to make their paths within the archive.
    """

    folder: str
    inside: str = ""
    category: str | None = None


def list_source(source: str, category: str | None, storage: Storage, several: bool = False) -> Iterator[Row]:
    """Manifest rows of any SOURCE.

    If the models are for ``several`` categories, ``category`` holds for every image of any SOURCE; without it an
    image's category is that of its dataset, or else the first folder below SOURCE.

    Raises:
        GladError: unknown category, several categories and none chosen, an unreadable list.
        StorageError: nothing there, no such bucket, wrong credentials.
    """
    source = absolute(source)
    trees = trees_of(source, category, storage, several)
    if trees is not None:
        rows: Iterator[Row] = (row for tree in trees for row in tree_rows(tree, storage.entries(tree.folder), storage))
    elif storage.kind(source) == "folder":
        rows = _list_split_file(source, category, storage, several)
    elif category is not None and not several:
        raise GladError(f"{source}: --category chooses within a dataset's folder, and this is no folder; leave it out")
    else:
        rows = _list_no_folder(source, storage)
    return with_categories(rows, source, category) if several else rows


def trees_of(source: str, category: str | None, storage: Storage, several: bool = False) -> list[Tree] | None:
    """The folder trees that make up an archive.

    None if ``source`` is no folder, or a dataset in VisA's layout, whose split file names its images. Raises as
    `list_source`.
    """
    if storage.kind(source) != "folder" or split_file(source, storage) is not None:
        return None
    folders = category_folders(source, storage)
    if several and (category is None or category in folders):
        chosen = list(folders) if category is None else [category]
    elif several:  # the category is a name for whatever is there
        chosen = _one_category(source, folders, None)
    else:
        chosen = _one_category(source, folders, category)
    # Ids count from the category's name on, so they are the same for the category's folder and for the one above it.
    return [Tree(join(folders[name], "test"), f"{name}/test/", name) for name in chosen] or [Tree(source)]


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


def tree_rows(tree: Tree, files: Iterable[Entry], storage: Storage) -> Iterator[Row]:
    """Manifest rows of a tree's files; their paths are relative to its folder."""
    for file in files:
        yield from _expand_one(f"{tree.folder}/{file.path}", tree.inside + file.path, file, tree.category, storage)


def with_categories(rows: Iterable[Row], source: str, category: str | None) -> Iterator[Row]:
    """The rows with the category that several models need: ``category``, their own, or the first folder."""
    for row in rows:
        parts = row["uri"].rpartition("::")[2].removeprefix(source).strip("/").split("/")
        folder = parts[0] if len(parts) > 1 else None
        yield row | {"category": category or row["category"] or folder}


def _list_no_folder(source: str, storage: Storage) -> Iterator[Row]:
    if storage.kind(source) == "file":
        suffix = PurePosixPath(source).suffix.lower()
        if suffix in LIST_SUFFIXES:
            return _list_uris(source, storage)
        with clear_errors(source, storage):
            return tree_rows(Tree(source.rpartition("/")[0]), [storage.entry(source)], storage)
    if WILDCARDS.search(source):
        return _list_glob(source, storage)
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
            yield _row(example.uri, example.path, None, example.category)


def _list_glob(pattern: str, storage: Storage) -> Iterator[Row]:
    fixed = pattern[: WILDCARDS.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if is_s3(pattern) and len(fixed) <= len("s3://"):
        raise GladError(f"{pattern}: the bucket itself cannot be a pattern; name it")
    matches = re.compile(glob_translate(pattern[len(fixed) + 1 :])).match
    files = (file for file in storage.entries(fixed or "/") if matches(file.path))
    return tree_rows(Tree(fixed), files, storage)


def _list_uris(source: str, storage: Storage) -> Iterator[Row]:
    """A list's entries in its order; relative ones count from the list's own folder, ids from the entry as written."""
    parent = source.rpartition("/")[0]
    for entry in _entries(source, storage):
        if "://" in entry or entry.startswith("/"):
            yield from _expand_one(entry, entry, Entry(entry, None, None), None, storage)
        else:
            yield from _expand_one(join(parent, entry), entry, Entry(entry, None, None), None, storage)


def _entries(source: str, storage: Storage) -> Iterator[str]:
    filesystem, path = storage.resolve(source)
    with clear_errors(source, storage):
        if not source.lower().endswith(".parquet"):
            with filesystem.open_input_stream(path) as stream:
                try:
                    for line in io.TextIOWrapper(stream, "utf-8-sig"):
                        if line.strip() and not line.startswith("#"):
                            yield line.strip()
                except UnicodeDecodeError as error:
                    raise GladError(f"{source}: not a UTF-8 text file; write one URI per line") from error
            return
        try:
            table = pq.ParquetFile(path, filesystem=filesystem)
        except pa.ArrowInvalid as error:
            raise GladError(f"{source}: not a readable Parquet file") from error
        names = [field.name for field in table.schema_arrow if pa.types.is_string(field.type)]
        if "uri" not in names:
            columns = ", ".join(table.schema_arrow.names)
            raise GladError(f"{source}: a Parquet list needs a string column 'uri'; it has {columns}")
        for batch in table.iter_batches(columns=["uri"]):
            yield from (uri for uri in batch["uri"].to_pylist() if uri)


def _expand_one(uri: str, archive_path: str, file: Entry, category: str | None, storage: Storage) -> Iterator[Row]:
    """One file: itself, or the images inside it if it is a tar shard."""
    if uri.lower().endswith((".tar", ".tar.gz", ".tgz")):
        yield from _list_tar(uri, archive_path, file.version, category, storage)
    else:
        yield _row(uri, archive_path, file.size, category) | {"version": file.version}


def _list_tar(
    uri: str, archive_path: str, version: str | None, category: str | None, storage: Storage
) -> Iterator[Row]:
    """The images of a tar shard, in its order; WebDataset's other members (.json, .cls, .txt) are skipped.

    A damaged shard gives the images before the damage, and one error row for itself.
    """
    problem: str | None = None
    try:
        filesystem, path = storage.resolve(uri)
        version = version or storage.entry(uri).version  # of before its members are read
        with filesystem.open_input_file(path) as stream, tarfile.open(fileobj=stream, mode="r:") as shard:
            end = stream.size()
            for member in shard:
                if not member.isfile() or not is_image(member.name):
                    continue
                if member.offset_data + member.size > end:
                    problem = f"cut off inside {member.name}"
                    break
                yield _row(f"tar://{member.name}::{uri}", f"{archive_path}::{member.name}", member.size, category) | {
                    "version": version,
                    "shard": uri,
                    "offset": member.offset_data,
                }
            else:
                # tarfile stops at a damaged header as at the end; only a whole archive has its block of zeros there.
                stream.seek(shard.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    problem = f"damaged or cut off at byte {shard.offset}"
    except FileNotFoundError:
        problem = "no such file"
    except (tarfile.TarError, OSError, StorageError) as error:
        compressed = uri.lower().endswith("gz")
        problem = "compressed; unpack it to a plain .tar, whose members can be read" if compressed else str(error)
    if problem is not None:
        message = " ".join(f"tar shard: {problem}".split())
        yield _row(uri, archive_path, None, category) | {"stage": "list", "error_type": "damaged", "message": message}


def _row(uri: str, archive_path: str, size: int | None, category: str | None) -> Row:
    digest = hashlib.sha256(os.fsencode(archive_path)).hexdigest()
    # A file name that is not UTF-8 cannot be a Parquet string. Escaped, it is not found again, and ends as an error.
    printable = os.fsencode(uri).decode("utf-8", "backslashreplace")
    return {"image_id": digest[:32], "uri": printable, "size": size, "category": category}
