"""Where bytes live: one way to list, read and write local folders and S3-compatible buckets.

Settings of S3 come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_REGION); what is not given falls back to the AWS default chain on the machine that connects. A `Storage` can be
pickled, so that remote tasks read with what the command was started with.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow.fs as pafs

from cluster import s3

ATTEMPTS, PATIENT_ATTEMPTS = 3, 12  # at one request to S3; with doubling waits twelve outlast 50 seconds


class StorageError(Exception):
    """Storage that cannot be used as asked. The message is one line: what, where, the way out."""


@dataclass(frozen=True)
class Storage:
    """How to reach S3; local paths need none of it. The secrets stay out of the repr, hence out of logs."""

    endpoint: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    attempts: int = ATTEMPTS

    @classmethod
    def from_environment(cls) -> Storage:
        env = os.environ.get
        return cls(
            endpoint=env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or None,
            access_key=env("AWS_ACCESS_KEY_ID") or None,
            secret_key=env("AWS_SECRET_ACCESS_KEY") or None,
            session_token=env("AWS_SESSION_TOKEN") or None,
            region=env("AWS_REGION") or env("AWS_DEFAULT_REGION") or None,
        )

    def patient(self) -> Storage:
        """The same for a job under way: it waits for a server that is gone or overloaded for most of a minute.

        Before that a wrong endpoint is the likelier reason, and the user should hear of it soon.
        """
        return replace(self, attempts=PATIENT_ATTEMPTS)

    def resolve(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """The pyarrow file system of a URI and the path inside it (``bucket/key`` or an absolute local path).

        Raises:
            StorageError: a scheme other than s3:// and file://, or no bucket named.
        """
        if is_s3(uri):
            path = uri.removeprefix("s3://").strip("/")
            if not path:
                raise StorageError(f"{uri}: names no bucket; write s3://BUCKET/PREFIX")
            return s3.filesystem(self), path
        return _local(), local_path(uri)

    def kind(self, uri: str) -> str:
        """``file``, ``folder`` or ``none``: what is at ``uri``."""
        filesystem, path = self.resolve(uri)
        with clear_errors(uri, self):
            info = filesystem.get_file_info(path)
            if info.type == pafs.FileType.NotFound and is_s3(uri):
                bucket = path.split("/")[0]
                if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise OSError("NO_SUCH_BUCKET")
        return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(info.type, "none")

    def walk(self, uri: str) -> Iterator[tuple[str, int]]:
        """Every regular file below ``uri`` as (path relative to it, size in bytes), in order of path, S3 in its own.

        Streamed: no more than a page of S3's listing, or a folder, is held. Hidden files and folders (a leading dot)
        are left out; so are pipes, sockets and folders behind symlinks.
        """
        _, root = self.resolve(uri)
        if not is_s3(uri):
            yield from _walk_local(root, "")
            return
        with clear_errors(uri, self):
            for key, size in s3.keys(self, *root.partition("/")[::2]):
                if not any(part.startswith(".") for part in key.split("/")):
                    yield key, size

    def level(self, uri: str) -> Iterator[tuple[str, int | None]]:
        """The files and folders directly in ``uri`` as (name, size in bytes), in the order `walk` meets them.

        A folder's size is None. The same are left out as by `walk`.
        """
        _, root = self.resolve(uri)
        if not is_s3(uri):
            yield from _local_level(root)
            return
        with clear_errors(uri, self):
            for name, size in s3.keys(self, *root.partition("/")[::2], delimiter="/"):
                if not name.startswith("."):
                    yield name, size

    def folders(self, uri: str) -> list[str]:
        """Names of the folders directly in ``uri``, sorted; empty if it is no folder."""
        filesystem, path = self.resolve(uri)
        with clear_errors(uri, self):
            infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def read(self, uri: str, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file, or ``size`` of them from ``offset``. Raises OSError as the file system does."""
        filesystem, path = self.resolve(uri)
        with filesystem.open_input_file(path) as stream:
            stream.seek(offset)
            return stream.read(size) if size is not None else stream.read()

    def size(self, uri: str) -> int:
        """Bytes of a file. Raises FileNotFoundError if there is none."""
        filesystem, path = self.resolve(uri)
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{uri}: no such file")
        return info.size

    def write(self, uri: str, data: bytes) -> None:
        """Write a whole file, replacing one that is there; a reader never sees half of it."""
        filesystem, path = self.resolve(uri)
        with clear_errors(uri, self):
            if is_s3(uri):
                with filesystem.open_output_stream(path) as stream:
                    stream.write(data)
                return
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.part")
            try:
                partial.write_bytes(data)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)  # a full disk needs the room

    def create(self, uri: str, data: bytes) -> bool:
        """Write a file only if there is none: True for the one caller that made it, False for everyone else."""
        _, path = self.resolve(uri)
        with clear_errors(uri, self):
            try:
                if is_s3(uri):
                    s3.create(self, path, data)
                    return True
                target = Path(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
                try:
                    partial.write_bytes(data)
                    os.link(partial, target)  # the whole file or none, and only where there is none
                except OSError as error:
                    if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise StorageError(
                            f"{uri}: this file system has no hard links, which a run needs to keep its books; "
                            "choose a folder on another one, or s3://"
                        ) from error
                    raise
                finally:
                    partial.unlink(missing_ok=True)
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                    return False
                raise

    def publish(self, folder: Path, uri: str, last: str) -> bool:
        """Copy a local folder to ``uri``: whole or not at all, with the file ``last`` appearing after all others.

        Returns:
            False where ``last`` is there already, so that somebody else was first.
        """
        if self.kind(join(uri, last)) == "file":
            return False
        with clear_errors(uri, self):
            if is_s3(uri):
                names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
                for name in [name for name in names if name != last] + [last]:
                    self.write(join(uri, name), (folder / name).read_bytes())
                return True
            target = Path(local_path(uri))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                shutil.copytree(folder, partial, dirs_exist_ok=True)
                partial.chmod(0o755)  # mkdtemp makes it private
                partial.rename(target)
            except OSError:
                if not (target / last).is_file():
                    raise
                return False
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return True

    def delete_folder(self, uri: str) -> None:
        """Remove everything below ``uri``; nothing there is fine."""
        filesystem, path = self.resolve(uri)
        with clear_errors(uri, self):
            if filesystem.get_file_info(path).type == pafs.FileType.Directory:
                filesystem.delete_dir(path)

    def delete_file(self, uri: str) -> None:
        """Remove one file; nothing there is fine."""
        filesystem, path = self.resolve(uri)
        with clear_errors(uri, self):
            if filesystem.get_file_info(path).type == pafs.FileType.File:
                filesystem.delete_file(path)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def local_path(uri: str) -> str:
    """A local path or file:// URI as an absolute path, ``~`` expanded.

    Raises:
        StorageError: another kind of URI.
    """
    if "://" in uri and not uri.startswith("file://"):
        raise StorageError(f"{uri}: unknown kind of location; use a local path, file:// or s3://")
    path = unquote(urlparse(uri).path) if uri.startswith("file://") else uri
    return os.path.abspath(os.path.expanduser(path))


def absolute(location: str) -> str:
    """The one spelling of a location a user gave: absolute, without a slash at its end.

    Raises:
        StorageError: neither a local path nor file:// or s3://, or s3:// without a bucket.
    """
    if not is_s3(location):
        return local_path(location)
    path = location.removeprefix("s3://").strip("/")
    if not path:
        raise StorageError(f"{location}: names no bucket; write s3://BUCKET/PREFIX")
    return f"s3://{path}"


def join(uri: str, *parts: str) -> str:
    """``uri`` with names added; works for local paths and S3 alike."""
    return "/".join([uri.rstrip("/") or "/", *parts]).replace("//", "/", 1 if uri == "/" else 0)


@contextmanager
def clear_errors(uri: str, storage: Storage) -> Iterator[None]:
    """Turns the file system's exceptions about ``uri`` into one-line `StorageError`s."""
    try:
        yield
    except OSError as error:
        raise StorageError(explain(uri, storage, error)) from error


def explain(uri: str, storage: Storage, error: OSError) -> str:
    """One line for an OSError about ``uri``: what happened and what to do."""
    text = " ".join(str(error).split())
    bucket = uri.removeprefix("s3://").split("/")[0]
    endpoint = storage.endpoint or "AWS"
    if is_s3(uri):
        if any(word in text for word in ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")):
            return f"{uri}: no bucket '{bucket}' at {endpoint}; create it or correct the name"
        if any(word in text for word in CREDENTIAL_WORDS):
            return (
                f"{uri}: {endpoint} refused the credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                f"and the rights on bucket '{bucket}'"
            )
        if any(word in text for word in NETWORK_WORDS):
            return f"{uri}: cannot reach {endpoint}; check AWS_ENDPOINT_URL and the network"
        if any(word in text for word in BUSY_WORDS):
            return f"{uri}: {endpoint} is overloaded or down; give the same command again when it answers"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{uri}: no space left on that disk; make room and give the same command again"
    if isinstance(error, FileNotFoundError):
        return f"{uri}: no such file or folder"
    if isinstance(error, PermissionError):
        return f"{uri}: permission denied; choose a location you may read and write"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{uri}: a file is in the way; choose another folder"
    return f"{uri}: {text}"


CREDENTIAL_WORDS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "SIGNATURE_DOES_NOT_MATCH",
    "Forbidden",
    "AccessDenied",
    "HTTP response code 403",
    "Unable to locate credentials",
    "No credentials",
)
BUSY_WORDS = ("SLOW_DOWN", "SlowDown", "SERVICE_UNAVAILABLE", "ServiceUnavailable", "HTTP status 503")
# Of libcurl: host not found, no connection, no answer in time. Others can be the fault of one object.
UNREACHABLE_WORDS = ("curlCode: 6,", "curlCode: 7,", "curlCode: 28,")
NETWORK_WORDS = ("NETWORK_CONNECTION", "Couldn't connect", "Could not connect", "curlCode", "Connection refused")


def is_outage(error: OSError) -> bool:
    """Whether the server did not answer at all, so that the file asked for is not to blame."""
    return any(word in str(error) for word in UNREACHABLE_WORDS + BUSY_WORDS)


def _walk_local(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    for name, size in _local_level(folder):
        if size is None:
            yield from _walk_local(f"{folder}/{name}", f"{prefix}{name}/")
        else:
            yield prefix + name, size


def _local_level(folder: str) -> Iterator[tuple[str, int | None]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise StorageError(explain(folder, Storage(), error)) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield entry.name, None
            continue
        try:
            status = entry.stat()
        except OSError:  # a dangling link: listed, so that it ends among the errors
            yield entry.name, 0
            continue
        if stat.S_ISREG(status.st_mode):
            yield entry.name, status.st_size


@lru_cache(maxsize=1)
def _local() -> pafs.LocalFileSystem:
    return pafs.LocalFileSystem()
