"""What a user may call SOURCE, turned into manifest rows: one per image, in a fixed order, streamed.

A folder tree, a glob, an MVTec-AD category (or a folder of several), a text or Parquet list of URIs, tar shards, a
single image; each local or on S3. ``image_id`` is a hash of the image's path within the archive, so a copied archive
keeps its ids.
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

from cluster.storage import Storage, StorageError, clear_errors, is_s3, join, local_path
from glad_core.errors import GladError, did_you_mean
from pipelines.archive.decode import IMAGE_SUFFIXES

LIST_SUFFIXES = {".txt", ".lst", ".parquet"}
WILDCARDS = re.compile(r"[*?\[]")
Row = dict[str, Any]


@dataclass(frozen=True)
class Tree:
    """A folder, all files of which are meant. ``inside`` comes before their paths below it in the archive's own."""

    folder: str
    inside: str = ""
    category: str | None = None


def list_source(source: str, category: str | None, storage: Storage, several: bool = False) -> Iterator[Row]:
    """Manifest rows of any SOURCE.

    Where the models are for ``several`` categories, ``category`` holds for every image, whatever the SOURCE; without
    it an image's category is its MVTec-AD category, or else the first folder below SOURCE.

    Raises:
        GladError: unknown category, several categories and none chosen, an unreadable list.
        StorageError: nothing there, no such bucket, wrong credentials.
    """
    source = source if is_s3(source) else local_path(source)
    trees = trees_of(source, category, storage, several)
    if trees is not None:
        rows: Iterator[Row] = (row for tree in trees for row in tree_rows(tree, storage.walk(tree.folder), storage))
    elif category is not None and not several:
        raise GladError(f"{source}: --category chooses within an MVTec-AD folder, and this is no folder; leave it out")
    else:
        rows = _list_no_folder(source, storage)
    return with_categories(rows, source, category) if several else rows


def trees_of(source: str, category: str | None, storage: Storage, several: bool = False) -> list[Tree] | None:
    """The folder trees that make up an archive, None where ``source`` is no folder. Raises as `list_source`."""
    if storage.kind(source) != "folder":
        return None
    known = _mvtec_categories(source, storage) if several else []
    if known and (category is None or category in known):
        return [_tree(join(source, name), name, storage) for name in (known if category is None else [category])]
    own = several and category != source.rpartition("/")[2]  # the category is not chosen here, it is only a name
    return [_tree(source, None if own else category, storage)]


def tree_rows(tree: Tree, files: Iterable[tuple[str, int]], storage: Storage) -> Iterator[Row]:
    """Manifest rows of a tree's files, given as (path below its folder, size)."""
    for path, size in files:
        yield from _expand_one(f"{tree.folder}/{path}", tree.inside + path, size, tree.category, storage)


def with_categories(rows: Iterable[Row], source: str, category: str | None) -> Iterator[Row]:
    """The rows with the category that several models need: the one named, their own, or the first folder."""
    for row in rows:
        inside = row["uri"].rpartition("::")[2].removeprefix(source).strip("/").split("/")
        folder = inside[0] if len(inside) > 1 else None
        yield row | {"category": category or row["category"] or folder}


def _list_no_folder(source: str, storage: Storage) -> Iterator[Row]:
    if storage.kind(source) == "file":
        suffix = PurePosixPath(source).suffix.lower()
        if suffix in LIST_SUFFIXES:
            return _list_uris(source, storage)
        parent, _, name = source.rpartition("/")
        return tree_rows(Tree(parent), [(name, storage.size(source))], storage)
    if WILDCARDS.search(source):
        return _list_glob(source, storage)
    raise StorageError(f"{source}: no such file or folder")


def _mvtec_categories(source: str, storage: Storage) -> list[str]:
    """Names of the MVTec-AD categories directly in a folder."""
    return [name for name in storage.folders(source) if {"train", "test"} <= set(storage.folders(join(source, name)))]


def _tree(source: str, category: str | None, storage: Storage) -> Tree:
    root = _mvtec_category(source, category, storage)
    if root is None:
        return Tree(source)
    name = root.rstrip("/").rpartition("/")[2]
    # Ids count from the category's name on, so they are the same whichever of the two folders is given.
    return Tree(join(root, "test"), f"{name}/test/", name)


def _mvtec_category(source: str, category: str | None, storage: Storage) -> str | None:
    """The folder of the MVTec-AD category meant, None where ``source`` is not laid out that way."""
    children = storage.folders(source)
    own_name = source.rstrip("/").rpartition("/")[2]
    if {"train", "test"} <= set(children):
        if category not in (None, own_name):
            raise GladError(f"{source} is the category '{own_name}', not '{category}'; leave --category out")
        return source
    known = _mvtec_categories(source, storage)
    if category is None and len(known) > 1:
        raise GladError(f"{source} holds {len(known)} categories ({', '.join(known)}): choose one with --category")
    if category is None:
        return join(source, known[0]) if known else None
    if not known:
        raise GladError(f"{source}: no MVTec-AD category (a folder with train/ and test/) in it; leave --category out")
    if category not in known:
        raise GladError(f"{source} has no category '{category}'{did_you_mean(category, known)}")
    return join(source, category)


def _list_glob(pattern: str, storage: Storage) -> Iterator[Row]:
    fixed = pattern[: WILDCARDS.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if is_s3(pattern) and len(fixed) <= len("s3://"):
        raise GladError(f"{pattern}: the bucket itself cannot be a pattern; name it")
    matches = re.compile(glob_translate(pattern[len(fixed) + 1 :])).match
    found = ((path, size) for path, size in storage.walk(fixed or "/") if matches(path))
    return tree_rows(Tree(fixed), found, storage)


def _list_uris(source: str, storage: Storage) -> Iterator[Row]:
    """A list's entries in its order; relative ones count from the list's own folder, ids from the entry as written."""
    parent = source.rpartition("/")[0]
    for entry in _entries(source, storage):
        if "://" in entry or entry.startswith("/"):
            yield from _expand_one(entry, entry, None, None, storage)
        else:
            yield from _expand_one(join(parent, entry), entry, None, None, storage)


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
            found = ", ".join(table.schema_arrow.names)
            raise GladError(f"{source}: a Parquet list needs a string column 'uri'; it has {found}")
        for batch in table.iter_batches(columns=["uri"]):
            yield from (uri for uri in batch["uri"].to_pylist() if uri)


def _expand_one(uri: str, archive_path: str, size: int | None, category: str | None, storage: Storage) -> Iterator[Row]:
    """One file: itself, or the images inside it if it is a tar shard."""
    if uri.lower().endswith((".tar", ".tar.gz", ".tgz")):
        yield from _list_tar(uri, archive_path, category, storage)
    else:
        yield _row(uri, archive_path, size, category)


def _list_tar(uri: str, archive_path: str, category: str | None, storage: Storage) -> Iterator[Row]:
    """The images of a shard, by their place in it; WebDataset's other members (.json, .cls, .txt) are no images.

    A shard that is damaged gives the images before the damage, and one error row for itself.
    """
    problem: str | None = None
    try:
        filesystem, path = storage.resolve(uri)
        with filesystem.open_input_file(path) as stream, tarfile.open(fileobj=stream, mode="r:") as shard:
            end = stream.size()
            for member in shard:
                if not member.isfile() or PurePosixPath(member.name).suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                if member.offset_data + member.size > end:
                    problem = f"cut off inside {member.name}"
                    break
                yield _row(f"tar://{member.name}::{uri}", f"{archive_path}::{member.name}", member.size, category) | {
                    "shard": uri,
                    "offset": member.offset_data,
                }
            else:
                # tarfile stops without a word at a damaged header; a whole archive stops at its block of zeros.
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
    # A file name that is no UTF-8 cannot be a Parquet string; escaped, it is not found again and says so as an error.
    printable = os.fsencode(uri).decode("utf-8", "backslashreplace")
    return {"image_id": digest[:32], "uri": printable, "size": size, "category": category}
