"""From a file of the archive to its manifest rows: one for an image, one for each image in a tar, one for an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.storage import ChangedError, Entry, Listed, Storage, StorageError, explain, is_s3, is_trouble
from glad_core.decoding.picture import is_image
from pipelines.archive.tar import Index, Member, read_index
from pipelines.archive.uris import image_id, printable, tar_uri

# Files that systems leave beside pictures, which nobody means.
HIDDEN = re.compile(r"(^|/)(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini|__MACOSX/.*)$", re.IGNORECASE)
# Why a file or entry has no row, as users read it.
IN_TARS, HIDDEN_FILES, COMMENTS, HEADERS, OUTSIDE, MASKS = (
    "files in tars that are no images",
    "hidden files or folders",
    "comments of the list",
    "header of the list",
    "files outside of the dataset's test set",
    "masks and files beside them in the dataset's test set",
)
LONGEST_MESSAGE = 500  # characters
Row = dict[str, Any]


@dataclass
class LeftOut:
    """What has no row: ``duplicates`` of images that have one, ``blank`` entries of a list, and others by reason.

    ``judged``: images that an earlier listing of the run has.
    """

    duplicates: int = 0
    blank: int = 0
    judged: int = 0
    others: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Tar:
    """What a tar holds, the version of it that was read, and why it could not be read: type of error and message."""

    index: Index
    version: str | None = None
    error: tuple[str, str] | None = None


def image_row(
    uri: str, id_: str, category: str | None = None, size: int | None = None, version: str | None = None
) -> Row:
    """The row of an image."""
    return {"image_id": id_, "uri": uri, "size": size, "version": version, "category": category}


def error_row(uri: str, id_: str, category: str | None, error_type: str, message: str) -> Row:
    """The row of what cannot be read."""
    line = " ".join(printable(message).split())[:LONGEST_MESSAGE]
    return image_row(uri, id_, category) | {"stage": "list", "error_type": error_type, "message": line}


def file_rows(
    uri: str, path: str, file: Entry, category: str | None, storage: Storage, left_out: LeftOut
) -> Iterable[Row]:
    """One file: itself, or the images inside it if it is a tar shard.

    Args:
        uri: in one line of UTF-8, see `cluster.locations.spelled`.
        path: within the archive.
        file: size and version, as far as they are known.
    """
    if HIDDEN.search(path):
        left_out.others[HIDDEN_FILES] += 1
        return ()
    if uri.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return _tar_rows(uri, path, file, category, storage, left_out)
    return (image_row(uri, image_id(path), category, file.size, file.version),)


def _tar_rows(
    uri: str, path: str, file: Entry, category: str | None, storage: Storage, left_out: LeftOut
) -> Iterator[Row]:
    tar = read_tar(uri, file, storage)
    left_out.duplicates += sum(map(is_image, tar.index.repeated))
    for member in tar.index.files():
        if HIDDEN.search(member.name):
            left_out.others[HIDDEN_FILES] += 1
        elif not is_image(member.name):  # such as WebDataset's .json, .cls and .txt
            left_out.others[IN_TARS] += 1
        else:
            yield _member_row(member, uri, path, tar.version, category)
    if tar.error is not None:  # the images before the damage have their rows
        yield error_row(uri, image_id(path), category, *tar.error)


def member_row(name: str, uri: str, path: str, tar: Tar) -> Row:
    """The row of the member ``name`` of a tar that has been read. Its id is that which `file_rows` gives it."""
    member = tar.index.find(name)
    if member is not None:
        return _member_row(member, uri, path, tar.version, None)
    error = tar.error or ("missing", "tar shard: it has no such member")
    return error_row(tar_uri(name, uri), image_id(path, name), None, *error)


def _member_row(member: Member, uri: str, path: str, version: str | None, category: str | None) -> Row:
    name, id_ = tar_uri(member.name, uri), image_id(path, member.name)
    if member.problem is not None:
        return error_row(name, id_, category, "damaged", f"tar shard: {member.problem}") | {"shard": uri}
    return image_row(name, id_, category, member.size, version) | {"shard": uri, "offset": member.offset}


def read_tar(uri: str, file: Entry, storage: Storage) -> Tar:
    """What a tar holds. That it cannot be read, or not to its end, is in the answer.

    Raises:
        StorageError: storage does not answer, which says nothing about the tar.
    """
    try:
        if file.size is None or file.version is None:
            file = storage.entry(uri)  # before its members are read: what changes meanwhile is noticed later
        same = Listed(file.size, file.version)
        index = read_index(lambda offset, size: storage.read(uri, offset, size, listed=same), file.size or 0)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return Tar(Index(), error=("missing", "tar shard: no such file"))
    except ChangedError as error:
        return Tar(Index(), error=("changed", f"tar shard: {error}; give the command again with another --out"))
    except OSError as error:
        if is_trouble(error) and not _is_at_fault(uri, error, storage):
            raise StorageError(explain(uri, storage.endpoint, error)) from error
        return Tar(Index(), error=("unreadable", f"tar shard: {explain(uri, storage.endpoint, error)}"))
    if index.problem is None:
        return Tar(index, file.version)
    compressed = uri.lower().endswith("gz")
    problem = "compressed; unpack it to a plain .tar, whose members can be read" if compressed else index.problem
    return Tar(index, file.version, ("damaged", f"tar shard: {problem}"))


def _is_at_fault(uri: str, error: OSError, storage: Storage) -> bool:
    """Whether it is the file that is refused, and not the credentials: its bucket can still be listed."""
    if "NoSuchBucket" in str(error):
        return True
    try:
        return isinstance(error, PermissionError) and (not is_s3(uri) or storage.entry(uri) is not None)
    except OSError:
        return False
