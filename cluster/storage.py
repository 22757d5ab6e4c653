"""One way to list, read and write local folders and S3-compatible buckets.

A `Storage` can be pickled, so that remote tasks read with the settings of the command that started them. The work is
done by `cluster.local` and `cluster.s3`.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import tenacity

from cluster import local, s3, s3_listing
from cluster.local import IS_HIDDEN, Entry, Listed
from cluster.locations import absolute, is_s3, join, local_path, spelled
from cluster.storage_errors import ChangedError, StorageError, UnorderedError, explain, is_disk_full, is_trouble

__all__ = [
    "IS_HIDDEN",
    "ChangedError",
    "Entry",
    "Listed",
    "Storage",
    "StorageError",
    "UnorderedError",
    "absolute",
    "clear_errors",
    "explain",
    "is_s3",
    "is_trouble",
    "join",
    "local_path",
    "spelled",
]

KEY_OF_A_FOLDER = "an object whose key ends with a slash; copy it to a key without"
# Between two attempts, seconds: from 0.5, 1, 2 ... to twice that, so that tasks that failed together do not come back
# together, and who is patient outlasts 50 seconds whatever is drawn. None begins after `PATIENCE`.
BACK_OFF = {"multiplier": 0.5, "max": 6}
PATIENCE = 90
UNKNOWN = Listed()
READERS = 16  # files read at a time


@dataclass(frozen=True)
class Storage(s3.Connection):
    """Files and folders by URI. The settings are those of S3; local paths need none."""

    def resolve(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """The pyarrow file system of a URI and the path inside it (``bucket/key`` or an absolute local path).

        Raises:
            StorageError: a scheme other than s3:// and file://, or no bucket in the URI.
        """
        location = absolute(uri)
        if is_s3(location):
            return s3.filesystem(self), location.removeprefix("s3://")
        return local.filesystem(), location

    def kind(self, uri: str) -> str:
        """Kind of entry at ``uri``: ``file``, ``folder`` or ``none``."""
        filesystem, path = self.resolve(uri)
        with clear_errors(uri, self):
            if not is_s3(uri):
                return local.kind(path)
            info = filesystem.get_file_info(path)
            if info.type == pafs.FileType.NotFound:
                bucket = path.split("/")[0]
                if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise OSError("NO_SUCH_BUCKET")
        return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(info.type, "none")

    def walk(self, uri: str, follow: bool = False) -> Iterator[tuple[str, int]]:
        """Every regular file below ``uri`` as (path relative to it, size in bytes), as `entries` lists them.

        Links to folders are left out, unless they are to ``follow``.

        Raises:
            StorageError: a folder cannot be listed.
        """
        for entry in self.entries(uri, follow):
            if entry.problem is None:
                yield entry.path, entry.size or 0
            elif entry.size is None:
                raise StorageError(entry.problem)

    def entries(
        self,
        uri: str,
        follow: bool = True,
        prefix: str = "",
        after: str | None = None,
        last: str | None = None,
        hidden: bool = False,
    ) -> Iterator[Entry]:
        """Everything below ``uri`` but folders, in order of path, S3 in its own; ``prefix`` is put before their paths.

        What cannot be listed or read is an entry with a problem. Only hidden files and folders (a leading dot) are left
        out, or with ``hidden`` have the problem `IS_HIDDEN`: a local folder once, on S3 each file in it. Links to
        folders are followed, but never in a circle. Streamed: memory holds one page of S3's listing or one folder. On
        S3, only the keys after ``after`` and up to ``last``, see `s3_listing.keys`.
        """
        _, root = self.resolve(uri)
        if not is_s3(uri):
            yield from local.entries(root, follow, prefix, hidden)
            return
        with clear_errors(uri, self):
            for key, size, version in s3_listing.keys(self, *root.partition("/")[::2], after=after, last=last):
                if any(part.startswith(".") for part in (prefix + key).split("/")):
                    if hidden:
                        yield Entry(prefix + key, size, version, IS_HIDDEN)
                else:
                    yield Entry(prefix + key, size, version, KEY_OF_A_FOLDER if key[-1:] in ("", "/") else None)

    def next_key(self, uri: str, after: str | None) -> str | None:
        """The first key below ``uri`` on S3 after ``after``; None if there is none. See `s3_listing.next_key`."""
        with clear_errors(uri, self):
            return s3_listing.next_key(self, *self.resolve(uri)[1].partition("/")[::2], after)

    def level(self, uri: str, prefix: str = "") -> Iterator[Entry]:
        """The files and folders directly in ``uri``, in the order of `entries`, with ``prefix`` before their names.

        With the hidden ones, as `entries` has them; a hidden folder on S3 is a folder.
        """
        _, root = self.resolve(uri)
        if not is_s3(uri):
            yield from local.level(root, prefix=prefix, hidden=True)
            return
        with clear_errors(uri, self):
            for name, size, version in s3_listing.keys(self, *root.partition("/")[::2], delimiter="/"):
                is_hidden = name.startswith(".") and size is not None
                yield Entry(prefix + name, size, version, IS_HIDDEN if is_hidden else None)

    def entry(self, uri: str) -> Entry:
        """One file as its folder lists it. Raises FileNotFoundError if there is none."""
        _, path = self.resolve(uri)
        name = path.rpartition("/")[2]
        if not is_s3(uri):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(f"{uri}: no such file")
            return Entry(name, status.st_size, str(status.st_mtime_ns))
        bucket, _, key = path.partition("/")
        return Entry(name, *s3_listing.find(self, bucket, key))

    def folders(self, uri: str) -> list[str]:
        """Names of the folders directly in ``uri``, sorted; empty if it is no folder."""
        _, path = self.resolve(uri)
        with clear_errors(uri, self):
            if not is_s3(uri):
                return local.folders(path)
            below = s3_listing.keys(self, *path.partition("/")[::2], delimiter="/")
            return sorted(name for name, size, _ in below if size is None and name)

    def read(
        self, uri: str, offset: int = 0, size: int | None = None, *, listed: Listed = UNKNOWN, most: int | None = None
    ) -> bytes:
        """The bytes of a file, or ``size`` of them from ``offset``, all from one version of it.

        After trouble of the connection or the disk it tries again, `attempts` times in all.

        Args:
            listed: what the whole file must still be.
            most: bytes that may be read.

        Raises:
            FileNotFoundError: no such file. ChangedError: not as ``listed``, too short, or written to meanwhile.
            OSError: any other reason; errno EFBIG if it is more than ``most``. See `is_trouble`.
            StorageError: a kind of location that is not read.
        """
        _, path = self.resolve(uri)
        back_end = partial(s3.read, self) if is_s3(uri) else local.read
        return self._persistent()(back_end, path, offset, size, listed, most)

    def _persistent(self, again: Callable[[BaseException], bool] = is_trouble) -> tenacity.Retrying:
        """Calls a function again after errors that pass; by default trouble of the connection or the disk."""
        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_after_delay(PATIENCE),
            wait=tenacity.wait_exponential(**BACK_OFF) + tenacity.wait_random_exponential(**BACK_OFF),
            retry=tenacity.retry_if_exception(again),
            reraise=True,
        )

    def open(self, uri: str) -> Any:
        """A file to read from, binary. Raises OSError as the file system does."""
        filesystem, path = self.resolve(uri)  # pyarrow opens no local name that is not UTF-8
        return filesystem.open_input_file(path) if is_s3(uri) else open(path, "rb")

    def size(self, uri: str) -> int:
        """Bytes of a file. Raises FileNotFoundError if there is none."""
        return self.entry(uri).size or 0

    def write(self, uri: str, data: bytes) -> None:
        """Write a whole file, replacing an existing one; a reader never sees half of it.

        After trouble of the connection to S3 it tries again, `attempts` times in all; a refusal is final.
        """
        _, path = self.resolve(uri)
        with clear_errors(uri, self):
            if is_s3(uri):
                self._persistent(_is_not_refused)(s3.write, self, path, data)
            else:
                local.write(path, data)

    def create(self, uri: str, data: bytes) -> bool:
        """Write a file only if there is none: True for the one caller that made it, False for everyone else."""
        _, path = self.resolve(uri)
        with clear_errors(uri, self):
            return s3.create(self, path, data) if is_s3(uri) else local.create(path, data)

    def check_creates(self, folder: str) -> None:
        """Prove, with a file that is deleted again, that ``folder`` can be written and that `create` keeps its word.

        Raises:
            StorageError: not writable, or the server ignores ``If-None-Match`` and replaces what is there.
        """
        probe = join(folder, f".probe-{uuid.uuid4().hex}")
        try:
            try:
                self.create(probe, b"first")
            except StorageError as error:
                raise StorageError(f"{folder} cannot be written; choose another folder ({error})") from error
            if self.create(probe, b"second"):
                raise StorageError(
                    f"{folder}: {self.endpoint or 'AWS'} ignores the header If-None-Match: two commands could write "
                    "one file; use an S3 server that honours it"
                )
            self.link(probe, f"{probe}-copy")
        finally:
            with suppress(StorageError):  # what went wrong first is what the user is to hear
                self.delete_files([probe, f"{probe}-copy"])

    def link(self, source: str, target: str) -> bool:
        """Make the file ``source`` be at ``target`` too, at once and whole; False if there is no ``source``.

        It is a hard link on a disk, which does not replace a file ``target``, and a copy within the server on S3, which
        does. Both are in one location.
        """
        _, source_path = self.resolve(source)
        _, target_path = self.resolve(target)
        with clear_errors(target, self):
            if is_s3(source):
                return s3.link(self, source_path, target_path)
            return local.link(source_path, target_path)

    def read_all(self, uris: Sequence[str]) -> list[bytes | None]:
        """The bytes of many small files, read in parallel; None for each that does not exist."""

        def read(uri: str) -> bytes | None:
            try:
                return self.read(uri)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise StorageError(explain(uri, self.endpoint, error)) from error

        if len(uris) == 1:
            return [read(uris[0])]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(read, uris))

    def holds(self, uri: str, size: int) -> bool:
        """Whether there is a file of that many bytes."""
        try:
            return self.size(uri) == size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(explain(uri, self.endpoint, error)) from error

    def delete_files(self, uris: Iterable[str]) -> None:
        """Remove files, in parallel; those that are not there are fine."""
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(self.delete_file, uris))

    def publish(self, folder: Path, uri: str, last: str) -> bool:
        """Copy a local folder to ``uri``: whole or not at all, with the file ``last`` appearing after all others.

        Returns:
            False if ``last`` is there already, so that somebody else was first.
        """
        if self.kind(join(uri, last)) == "file":
            return False
        _, path = self.resolve(uri)
        with clear_errors(uri, self):
            if not is_s3(uri):
                return local.publish(folder, Path(path), last)
            s3.publish(self, folder, path, last)
            return True

    def assemble(self, uri: str, sources: Mapping[str, str], last: str, data: bytes, linked: bool = False) -> bool:
        """Make the folder ``uri`` of copies of files: whole or not at all, with the file ``last`` after all others.

        Args:
            sources: location of each file, by its name in the new folder.
            data: content of the file ``last``.
            linked: on one disk link the files instead, for a folder that is deleted soon.

        Returns:
            False if ``last`` is there already, so that somebody else was first.
        """
        if self.kind(join(uri, last)) == "file":
            return False
        _, path = self.resolve(uri)
        with clear_errors(uri, self):
            if is_s3(uri):
                for name, source in sources.items():
                    self._copy_to_s3(source, f"{path}/{name}")
                return s3.create(self, f"{path}/{last}", data)
            with local.whole_folder(Path(path)) as partial:
                for name, source in sources.items():
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    if not (linked and not is_s3(source) and local.linked(local_path(source), partial / name)):
                        self.fetch(source, partial / name)
                (partial / last).write_bytes(data)
        return True

    def _copy_to_s3(self, source: str, path: str) -> None:
        _, source_path = self.resolve(source)
        if is_s3(source):
            s3.copy(self, source_path, path)
        else:
            s3.send(self, Path(source_path), path)

    def fetch(self, uri: str, target: Path) -> None:
        """Copy one file to a new local one, in little memory. After trouble of the connection it goes on where it was.

        Raises:
            StorageError: ``uri`` cannot be read. OSError: the disk of ``target`` is full.
        """
        _, path = self.resolve(uri)
        try:
            if is_s3(uri):
                self._persistent()(s3.fetch, self, path, target)
            else:
                shutil.copyfile(path, target)
        except OSError as error:
            if is_disk_full(error):
                raise
            raise StorageError(explain(uri, self.endpoint, error)) from error

    def delete_folder(self, uri: str) -> None:
        """Remove everything below ``uri``; nothing there is fine."""
        filesystem, path = self.resolve(uri)
        with clear_errors(uri, self):
            if filesystem.get_file_info(path).type == pafs.FileType.Directory:
                with suppress(FileNotFoundError):  # somebody else has deleted it, or its last file
                    filesystem.delete_dir(path)

    def delete_file(self, uri: str, only: bytes | None = None) -> None:
        """Remove one file; nothing there is fine.

        Args:
            only: remove it only if it holds these bytes. S3 compares while it deletes, if it honours ``If-Match``; a
                disk does so a moment before.
        """
        _, path = self.resolve(uri)
        with clear_errors(uri, self):
            if is_s3(uri):
                s3.delete(self, path, only)
            else:
                local.delete(path, only)


def _is_not_refused(error: BaseException) -> bool:
    """Whether a write that failed may pass later. Rights on a place to write to do not come by themselves."""
    return is_trouble(error) and not isinstance(error, PermissionError)


@contextmanager
def clear_errors(uri: str, storage: Storage) -> Iterator[None]:
    """Turn the file system's exceptions about ``uri`` into one-line `StorageError`s."""
    try:
        yield
    except OSError as error:
        raise StorageError(explain(uri, storage.endpoint, error)) from error
