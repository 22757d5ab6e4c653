"""The local back end of `cluster.storage`: whatever pyarrow's file system of this machine does not do itself."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs

from cluster.storage_errors import ChangedError, StorageError, explain


@lru_cache(maxsize=1)
def filesystem() -> pafs.LocalFileSystem:
    return pafs.LocalFileSystem()


class Listed(NamedTuple):
    """What is known of a file from its listing, None where it is not: bytes, and `Entry.version`."""

    size: int | None = None
    version: str | None = None

    def check(self, path: str, size: int | None, version: str | None) -> None:
        """Raise `ChangedError` unless a file that is read now is the one that was listed."""
        for then, now in zip(self, (size, version), strict=True):
            if then is not None and now is not None and then != now:
                raise ChangedError(f"{path}: changed since it was listed")


class Entry(NamedTuple):
    """A file or folder that storage lists.

    Attributes:
        path: relative to the folder that is listed.
        size: bytes; None for a folder.
        version: changes when the file's bytes do: its ETag on S3, with the quotes of the server's answer; of a local
            file the time of its last change in nanoseconds. None for a folder.
    """

    path: str
    size: int | None
    version: str | None


def walk(folder: str, prefix: str = "") -> Iterator[Entry]:
    """Every regular file below ``folder``, with ``prefix`` before its relative path, in order of path."""
    for entry in level(folder):
        if entry.size is None:
            yield from walk(f"{folder}/{entry.path}", f"{prefix}{entry.path}/")
        else:
            yield entry._replace(path=prefix + entry.path)


def level(folder: str) -> Iterator[Entry]:
    """Files and folders directly in ``folder``, in order of name.

    Hidden entries, pipes, sockets and links to folders are left out.

    Raises:
        StorageError: the folder cannot be listed; the message names it, not the folder the walk began with.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise StorageError(explain(folder, None, error)) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield Entry(entry.name, None, None)
            continue
        try:
            status = entry.stat()
        except OSError:  # a dangling link: listed, so that it ends among the errors
            yield Entry(entry.name, 0, None)
            continue
        if stat.S_ISREG(status.st_mode):
            yield Entry(entry.name, status.st_size, str(status.st_mtime_ns))


def read(path: str, offset: int, size: int | None, listed: Listed, most: int | None) -> bytes:
    """See `Storage.read`; one attempt."""
    with open(path, "rb", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{path}: no file, but a folder or a device")
        listed.check(path, status.st_size, str(status.st_mtime_ns))
        if size is None:
            size = status.st_size - offset
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"{size} bytes")
        file.seek(offset)
        data = file.read(size)
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns) or len(data) < size:
        raise ChangedError(f"{path}: changed while it was read")
    return data


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would wait for its writer


def write(path: str, data: bytes) -> None:
    """Write a whole file, replacing an existing one; a reader never sees half of it."""
    with _written_beside(path, data) as partial:
        partial.replace(path)


def create(path: str, data: bytes) -> bool:
    """Write a file only if there is none: True for the one caller that made it, False for everyone else.

    Raises:
        StorageError: the file system has no hard links.
    """
    with _written_beside(path, data) as partial:
        try:
            os.link(partial, path)  # the whole file or none, and only if there is none
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise StorageError(
                    f"{path}: this file system has no hard links, which a run needs for its bookkeeping; "
                    "choose a folder on another one, or s3://"
                ) from error
            raise
    return True


def publish(folder: Path, target: Path, last: str) -> bool:
    """Copy ``folder`` to ``target`` whole or not at all; False if a ``target`` with the file ``last`` was first."""
    try:
        with whole_folder(target) as partial:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            partial.chmod(0o755)  # mkdtemp makes it private
    except OSError:
        if not (target / last).is_file():
            raise
        return False
    return True


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``target`` at the end; after an error nothing of it remains.

    Raises:
        OSError: ``target`` cannot be made, also because another process made it first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _written_beside(path: str, data: bytes) -> Iterator[Path]:
    """``data`` in a hidden file in the folder of ``path``, removed at the end if it is still there."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        partial.write_bytes(data)
        yield partial
    finally:
        partial.unlink(missing_ok=True)  # a full disk needs the room
