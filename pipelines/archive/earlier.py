"""What a run that grows has listed before, so that a further listing holds new images only (`glad score --new`)."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cluster.storage import Storage, StorageError, absolute, is_s3
from glad_core.decoding.picture import ImageError
from pipelines.archive.decoder import SECONDS, decoder
from pipelines.archive.fetch import fetch
from pipelines.archive.rows import LeftOut, Row
from pipelines.archive.uris import path_of

KEY_BYTES = 16
YOUNG = 60.0  # seconds: a file on a disk that is younger may still be written
SETTLED = 2.0  # seconds between two looks at such a file
DECODED = 200  # such files that are decoded to see whether they are whole, the youngest
CHANGED = "judged before, changed since, and not judged again"
BEING_WRITTEN = "still being written, left for the next time"


class Earlier(NamedTuple):
    """The images of earlier listings: their keys, sorted, S16 [N], and the `mark_of` each, u8 [N]."""

    keys: np.ndarray
    marks: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> Earlier:
        """The images in a table with a manifest's columns."""
        rows = table.to_pylist()
        keys = np.frombuffer(b"".join(map(key_of, rows)), f"S{KEY_BYTES}")
        return cls.joined([cls(keys, np.array([mark_of(row) for row in rows], np.uint64))])

    @classmethod
    def joined(cls, parts: Sequence[Earlier]) -> Earlier:
        """The images of all parts."""
        keys, first = np.unique(np.concatenate([part.keys for part in parts]), return_index=True)
        return cls(keys, np.concatenate([part.marks for part in parts])[first])

    def get(self, key: bytes) -> int | None:
        """The mark of an image; None if no earlier listing has it."""
        wanted = np.array(key, self.keys.dtype)  # as bytes, a key that ends in zeros would equal none: numpy drops them
        place = int(np.searchsorted(self.keys, wanted))
        return int(self.marks[place]) if place < len(self.keys) and self.keys[place] == wanted else None


def key_of(row: Row) -> bytes:
    """The same 16 bytes for every spelling of an image's location; of what could not be read, its id."""
    if row.get("error_type") is not None:
        return bytes.fromhex(row["image_id"])
    shard = row.get("shard")
    place = absolute(row["uri"]) if shard is None else f"{path_of(row['uri'])}::{absolute(shard)}"
    return hashlib.sha256(os.fsencode(place)).digest()[:KEY_BYTES]


def mark_of(row: Row) -> int:
    """A number that changes when the size or the version of an image's file does."""
    text = f"{row.get('size')} {row.get('version')}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def new_rows(rows: Iterable[Row], earlier: Earlier, storage: Storage, left_out: LeftOut) -> Iterator[Row]:
    """The rows of images that no earlier listing has, those of young files last.

    Counts what is there already, what of it has changed, and what still changes.
    """
    young = []
    for row in rows:
        mark = earlier.get(key_of(row))
        if mark is not None:
            left_out.judged += 1
            left_out.others[CHANGED] += mark != mark_of(row)
        elif _is_young(row, storage):
            young.append(row)
        else:
            yield row
    if not young:
        return
    time.sleep(SETTLED)
    young.sort(key=lambda row: int(row.get("version") or 0), reverse=True)
    for number, row in enumerate(young):
        if _is_settled(row, storage) and (number >= DECODED or _is_whole(row, storage)):
            yield row
        else:
            left_out.others[BEING_WRITTEN] += 1


def _is_young(row: Row, storage: Storage) -> bool:
    """Whether a file may still be written. On S3 none is: an object appears whole."""
    version = _version(row, storage)
    return version is not None and abs(time.time() - int(version) / 1e9) < YOUNG


def _is_settled(row: Row, storage: Storage) -> bool:
    now = _version(row | {"version": None}, storage)
    return now is not None and now == (row.get("version") or now)


def _version(row: Row, storage: Storage) -> str | None:
    """When a file on a disk was last changed, in nanoseconds; None if it cannot be known."""
    file = row.get("shard") or row["uri"]
    try:
        return None if is_s3(file) else row.get("version") or storage.entry(file).version
    except (OSError, StorageError):
        return None


def _is_whole(row: Row, storage: Storage) -> bool:
    try:
        decoder(SECONDS).decode(fetch(storage, row), 1)
    except (ImageError, StorageError):
        return False
    return row.get("error_type") is None
