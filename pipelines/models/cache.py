"""Copies of bundles from s3:// on this machine: one for all of its processes, in `GLAD_CACHE` (~/.cache/glad).

bundles/NAME/        a whole copy; its name is a hash of the bundle's location and its glad.json
bundles/NAME.part/   a copy that is being made, or that a killed process left
bundles/NAME.lock    a process that uses the copy holds it shared; its time is that of the last use
bundles/copy.lock    whoever makes or deletes copies holds it
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from cluster.storage import Storage, StorageError, join
from glad_core.bundle.glad_json import GLAD_JSON, Description, read_description, verify
from glad_core.errors import GladError

DEFAULT = "~/.cache/glad"
DISK_SHARE = 0.5  # of the disk, for all copies, unless GLAD_CACHE_GB says otherwise
SPARE = 0.1  # of the disk, for others: Ray stops to spill objects at 5 %
KEPT = 8  # latest copies of a process that no other may delete: more than anyone holds at a time
SPREAD = 5.0  # seconds; machines that start together do not ask S3 at the same moment

_used: OrderedDict[Path, int] = OrderedDict()  # copies that this process uses, and the descriptors of their locks


def cached(location: str, text: bytes, describe: Callable[[], Description], storage: Storage) -> Path:
    """The copy of the bundle at ``location``, made unless it is there.

    It stays as long as it is among the latest `KEPT` of a living process. Beyond the limit of the cache those that
    nobody uses are deleted, the least recently used first.

    Args:
        text: the bundle's glad.json.
        describe: checks the files beside it and returns its content; called only before a copy.

    Raises:
        GladError: the bundle does not hold what glad.json says. StorageError: S3 or the cache's disk cannot be used.
    """
    folder = _bundles() / hashlib.sha256(location.encode() + text).hexdigest()[:24]
    try:
        while not _use(folder):
            with FileLock(_made(folder.parent) / "copy.lock"):  # the kernel takes it from a process that dies
                if not _is_whole(folder):
                    _copy(location, text, describe(), folder, storage)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "make room there, or set GLAD_CACHE to a folder that can be written"
        raise StorageError(f"{folder.parent}: no copy of {location} can be kept there ({reason}); {advice}") from error
    return folder


def _bundles() -> Path:
    return Path(os.environ.get("GLAD_CACHE") or DEFAULT).expanduser() / "bundles"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        read_description(folder)
    except GladError:
        return False
    return True


def _use(folder: Path) -> bool:
    """Keep others from deleting a copy; False if there is none."""
    if folder not in _used:
        if not _is_whole(folder):
            return False
        lock = folder.with_suffix(".lock")
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT, 0o666)
        except OSError:
            return True  # nobody deletes from a cache that is not writable
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while somebody deletes the copy, and then the lock as well
        if not (lock.exists() and os.path.samestat(os.fstat(descriptor), os.stat(lock)) and _is_whole(folder)):
            os.close(descriptor)
            return False
        _used[folder] = descriptor
        while len(_used) > KEPT:
            os.close(_used.popitem(last=False)[1])
    with suppress(PermissionError):  # another user's
        os.utime(_used[folder])
    _used.move_to_end(folder)
    return True


def _copy(location: str, text: bytes, description: Description, folder: Path, storage: Storage) -> None:
    size = sum(entry.size for entry in description.files.values())
    time.sleep(random.uniform(0, min(SPREAD, size / 1e9)))  # a small part of what the copy takes
    _make_room(folder.parent, size, location)
    part = folder.with_suffix(".part")
    try:
        for name in description.files:  # these are names of a bundle's files, so none leads out of the folder
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(join(location, name), part / name)
        (part / GLAD_JSON).write_bytes(text)
        try:
            verify(part)  # a bundle that was replaced meanwhile would stay in the cache as a mixture
        except GladError as error:
            raise GladError(str(error).replace(str(part), location)) from error
        shutil.rmtree(folder, ignore_errors=True)  # one that has lost a file
        folder.with_suffix(".lock").touch()  # the latest, so the last to be deleted
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make_room(bundles: Path, size: int, location: str) -> None:
    """Delete what killed processes left, then copies that nobody uses until ``size`` more bytes fit.

    Raises:
        StorageError: the disk has no room all the same.
    """
    for part in bundles.glob("*.part"):
        shutil.rmtree(part, ignore_errors=True)
    limit = _limit(bundles)
    folders = sorted((folder for folder in bundles.iterdir() if folder.is_dir()), key=_last_use)
    held = {folder: _bytes(folder) for folder in folders}
    for folder in folders:
        disk = shutil.disk_usage(bundles)
        if sum(held.values()) + size <= limit and disk.free - size >= SPARE * disk.total:
            return
        if _delete_unless_used(folder):
            del held[folder]
    free = shutil.disk_usage(bundles).free
    if free < size:
        raise StorageError(
            f"{bundles}: {free / 1e9:.2f} GB are free on that disk, too few for a copy of {location} "
            f"({size / 1e9:.2f} GB); make room there, or set GLAD_CACHE to a folder on a larger disk"
        )


def _limit(bundles: Path) -> float:
    """Bytes of all copies together."""
    value = os.environ.get("GLAD_CACHE_GB")
    if not value:
        return DISK_SHARE * shutil.disk_usage(bundles).total
    try:
        limit = float(value) * 1e9
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise GladError(f"GLAD_CACHE_GB={value}: give the gigabytes that copies of bundles may take, such as 50")
    return limit


def _last_use(folder: Path) -> float:
    lock = folder.with_suffix(".lock")
    return (lock if lock.exists() else folder).stat().st_mtime


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _delete_unless_used(folder: Path) -> bool:
    lock = folder.with_suffix(".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
        lock.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
