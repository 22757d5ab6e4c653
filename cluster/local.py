"""The local back end of `cluster.storage`: whatever pyarrow's file system of this machine does not do itself."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs

from cluster.storage_errors import ChangedError, StorageError, explain

IS_HIDDEN = "hidden"


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
        size: bytes; None for a folder. (With a problem: for one that cannot be listed.)
        version: changes when the file's bytes do: its ETag on S3, with the quotes of the server's answer; of a local
            file the time of its last change in nanoseconds. None for a folder.
        problem: why it cannot be read, None if nothing is known against it.
    """

    path: str
    size: int | None
    version: str | None
    problem: str | None = None


def entries(folder: str, follow: bool, prefix: str, hidden: bool = False) -> Iterator[Entry]:
    """Everything below ``folder`` that `level` lists, but for the folders in it, in order of path.

    A folder that cannot be listed is an entry without size whose problem begins with its location.
    """
    below = [(prefix, level(folder, follow, prefix, hidden))]
    while below:
        above, listed = below[-1]
        try:
            for entry in listed:
                if entry.size is None:
                    inside = f"{entry.path}/"
                    below.append((inside, level(f"{folder}/{entry.path[len(prefix) :]}", follow, inside, hidden)))
                    break
                yield entry
            else:
                below.pop()
        except StorageError as error:
            below.pop()
            yield Entry(above.rstrip("/"), None, None, str(error))


def level(folder: str, follow: bool = True, prefix: str = "", hidden: bool = False) -> Iterator[Entry]:
    """Files and folders directly in ``folder``, in order of name, with ``prefix`` before it.

    Hidden ones (a leading dot) are left out, or with ``hidden`` are entries with the problem `IS_HIDDEN`. A hidden
    folder is not opened: a snapshot in it may be as large as the archive.

    A link to a folder is that folder if links are to ``follow``, unless it is one that the path to the link leads
    through. Pipes, sockets, devices and other links to folders are entries with a problem.

    Raises:
        StorageError: the folder cannot be listed; the message names it, not the folder the walk began with.
    """
    try:
        listed = sorted(os.scandir(folder), key=attrgetter("name"))
    except OSError as error:
        raise StorageError(explain(folder, None, error)) from error
    for entry in listed:
        path = prefix + entry.name
        if entry.name.startswith("."):
            if hidden:
                yield Entry(path, 0, None, IS_HIDDEN)
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                yield Entry(path, None, None)
                continue
            status = entry.stat()
        except OSError:  # a dangling link: listed, so that it ends among the errors
            yield Entry(path, 0, None)
            continue
        if stat.S_ISREG(status.st_mode):
            yield Entry(path, status.st_size, str(status.st_mtime_ns))
        elif not stat.S_ISDIR(status.st_mode):
            yield Entry(path, 0, None, "a pipe, socket or device, no file")
        elif follow and not _leads_through(folder, status):
            yield Entry(path, None, None)
        else:
            yield Entry(path, 0, None, "a link back to a folder that it lies in")


def _leads_through(path: str, folder: os.stat_result) -> bool:
    """Whether ``path`` is ``folder`` or goes through it."""
    try:
        return any(os.path.samestat(os.stat(above), folder) for above in (Path(path), *Path(path).parents))
    except OSError:  # removed meanwhile
        return True


def folders(folder: str) -> list[str]:
    """Names of the folders directly in ``folder``, sorted; empty if it is none. Raises OSError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in entries
                if (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())  # a link may lead to itself
            ]
        return sorted(names)
    except (FileNotFoundError, NotADirectoryError):
        return []


def kind(path: str) -> str:
    """Kind of entry at ``path``: ``file``, ``folder`` or ``none``. Raises OSError if that cannot be known."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "none"
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "none"


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
            _hard_link(partial, path)  # the whole file or none, and only if there is none
        except FileExistsError:
            return False
    return True


def link(source: str, target: str) -> bool:
    """Give a file a second name, unless that name is taken; False if there is no ``source``.

    Raises:
        StorageError: the file system has no hard links.
    """
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        _hard_link(source, target)
    except FileExistsError:
        return os.path.lexists(source)
    except FileNotFoundError:
        return False
    return True


def linked(source: str, target: Path) -> bool:
    """Give a file a second name, if both are on one disk that can do so."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _hard_link(source: str | Path, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise StorageError(
                f"{target}: this file system has no hard links, which a run needs for its bookkeeping; "
                "choose a folder on another one, or s3://"
            ) from error
        raise


def delete(path: str, only: bytes | None = None) -> None:
    """Delete a file; nothing there is fine. With ``only``, delete it only if it holds these bytes."""
    with suppress(FileNotFoundError):
        if only is None or Path(path).read_bytes() == only:
            os.unlink(path)


def publish(folder: Path, target: Path, last: str) -> bool:
    """Copy ``folder`` to ``target`` whole or not at all; False if a ``target`` with the file ``last`` was first."""
    try:
        with whole_folder(target) as partial:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
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
        partial.chmod(0o755)  # mkdtemp makes it private
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
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # after a power cut a file of this name would otherwise be there, but empty
        yield partial
    finally:
        partial.unlink(missing_ok=True)  # a full disk needs the room
