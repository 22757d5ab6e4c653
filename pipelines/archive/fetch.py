"""The bytes of a manifest row. A failure is the image's own only if another image can be read at that moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from cluster.storage import ChangedError, Listed, Storage, StorageError, absolute, explain, is_s3, is_trouble
from glad_core.decoding.picture import ImageError
from pipelines.archive.sources import WILDCARDS

FETCH_THREADS = 8
MAX_BYTES = 512 * 2**20  # of one image
AT_HAND = 3  # images of a list that are read to see whether the connection works
QUICK = 2  # attempts before the question arises who is at fault

Row = dict[str, Any]  # of the manifest: its columns as in `listing.MANIFEST_SCHEMA`; from elsewhere "uri" at least


def fetch(storage: Storage, row: Row, others: Callable[[], Iterable[Row]] = tuple, source: str | None = None) -> bytes:
    """The bytes of one manifest row; of a tar member only its own range is read.

    Args:
        others: rows of other images. If one of them can be read and this one cannot, this image is at fault; if none
            can, the connection or the disk is.
        source: what was listed, absolute. If it is gone, no image of it is to blame.

    Raises:
        ImageError: missing, changed, unreadable, empty or too_large.
        StorageError: storage does not answer or refuses everything, which says nothing about the image.
    """
    file = row.get("shard") or row["uri"]
    try:
        absolute(file)
    except StorageError as error:
        raise ImageError("unreadable", str(error)) from error
    try:
        data = _read_or_blame(storage, file, row, others)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if source is not None:
            _check_source(source)
        raise ImageError("missing", f"{file}: no such file") from error
    except ChangedError as error:
        raise ImageError("changed", f"{error}; give the command again with another --out") from error
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EFBIG:
            raise ImageError("too_large", f"{error.args[1]}, more than the {MAX_BYTES} read for one image") from error
        raise ImageError("unreadable", f"{file}: {' '.join(str(error).split())}") from error
    if not data:
        raise ImageError("empty", "the file has no bytes")
    return data


def neighbours(row: Row, rows: Sequence[Row]) -> Sequence[Row]:
    """Some other images among ``rows``, spread over them: for ``others`` of `fetch`."""
    others = [other for other in rows if not other.get("error_type") and _place(other) != _place(row)]
    return others[:: max(1, len(others) // AT_HAND)][:AT_HAND]


def _place(row: Row) -> tuple[Any, ...]:
    return row["uri"], row.get("shard"), row.get("offset")


def _read_or_blame(storage: Storage, file: str, row: Row, others: Callable[[], Iterable[Row]]) -> bytes:
    """The row's bytes; an OSError about this image.

    Raises:
        StorageError: neither this image nor another can be read.
    """
    trouble: OSError | None = None
    for attempts in (min(QUICK, storage.attempts), storage.attempts):
        try:
            return _read(replace(storage, attempts=attempts), row)
        except OSError as error:
            if not is_trouble(error):
                raise
            trouble = error
        # A file that is forbidden stays so. Anything else passes more often than not, and is given the whole patience.
        if attempts == storage.attempts or isinstance(trouble, PermissionError):
            once = replace(storage, attempts=1)
            if _any_readable(once, others()):
                return _read(once, row)
    assert trouble is not None
    raise StorageError(explain(file, storage.endpoint, trouble)) from trouble


def _read(storage: Storage, row: Row) -> bytes:
    size, version = row.get("size"), row.get("version")
    if size is not None and size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{size} bytes")
    if row.get("shard"):
        return storage.read(row["shard"], row["offset"], size, listed=Listed(version=version))
    return storage.read(row["uri"], listed=Listed(size, version), most=MAX_BYTES)


def _any_readable(storage: Storage, rows: Iterable[Row]) -> bool:
    """Whether a byte of any of the images can be read. A few are tried at a time: a silent server lets each wait."""
    waiting = iter(rows)
    with ThreadPoolExecutor(AT_HAND) as pool:
        while group := list(islice(waiting, AT_HAND)):
            if any(pool.map(partial(_is_readable, storage), group)):
                return True
    return False


def _is_readable(storage: Storage, row: Row) -> bool:
    try:
        return bool(storage.read(row.get("shard") or row["uri"], row.get("offset") or 0, 1))
    except (OSError, ValueError, StorageError):
        return False


def _check_source(source: str) -> None:
    """Raise `StorageError` if a local source is gone or an empty folder, as that of a disk that is not mounted is."""
    if is_s3(source):
        return
    wildcard = WILDCARDS.search(source)
    root = source[: wildcard.start()].rpartition("/")[0] or "/" if wildcard else source
    try:
        there = os.path.isfile(root) or any(os.scandir(root))
    except OSError:
        there = False
    if not there:
        raise StorageError(f"{root}: gone or empty; give the same command again when its disk is back")
