"""Decoded pictures kept in Ray's object store while a model is trained on them, within a bound.

A training run needs every picture once an epoch. Those that are kept are decoded once, at the scale that they are used
at; the others anew each time. A kept picture that is not at hand (not ready yet, or lost with its machine) is decoded
as well, so nothing depends on what is kept but the speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import session
from cluster.storage import Storage, StorageError
from glad_core.decoding.picture import ImageError, decode
from glad_core.views import Frames, Framing
from pipelines.archive.fetch import fetch
from pipelines.train.good_images import GoodImage

KEPT_SHARE = 0.5  # of the object store of one machine, by all training runs of a command
BATCH_BYTES = 32 * 2**20  # in one object, which goes to a machine as a whole
DATA_CPUS = 0.5  # of a task that decodes images
# Bytes that every process of a run asks Ray for: a machine that declares no memory for work, as a head may, gets none.
TASK_MEMORY = 500_000_000


@dataclass(frozen=True)
class Kept:
    """Frames by URI: the object that holds them and their place in it."""

    framings: tuple[Framing, ...]
    objects: list[Any]
    places: dict[str, tuple[int, int]]

    def frames(self, uri: str) -> Frames | None:
        """A picture's frames, None if they are not at hand."""
        import ray

        if uri not in self.places:
            return None
        number, row = self.places[uri]
        ready, _ = ray.wait([self.objects[number]], timeout=0, fetch_local=False)
        try:
            return ray.get(ready[0])[row] if ready else None
        except ray.exceptions.RayError:
            return None


def kept_bytes(parallel: int) -> int:
    """What each of ``parallel`` training runs may keep in the connected cluster."""
    return int(session.store_bytes() * KEPT_SHARE / parallel)


def read_frames(
    images: Sequence[GoodImage], framings: tuple[Framing, ...], storage: Storage, kept: Kept | None = None
) -> Iterator[Frames]:
    """Decoded images as the views see them. Raises ImageError if one cannot be read."""
    usable = kept if kept is not None and kept.framings == framings else None
    for image in images:
        yield (usable and usable.frames(image.uri)) or _read(image.uri, framings, storage)


def _read(uri: str, framings: Sequence[Framing], storage: Storage) -> Frames:
    picture = decode(fetch(storage, {"uri": uri, "size": None}), framings)
    return Frames(picture.frames, (picture.height, picture.width))


def keep(
    images: Sequence[GoodImage],
    sizes: Sequence[tuple[int, int]],
    framings: tuple[Framing, ...],
    storage: Storage,
    most_bytes: int,
) -> Kept:
    """Have tasks decode the first images, as many as ``most_bytes`` hold. Returns at once.

    Args:
        sizes: heights and widths of the images, pixels.
    """
    import ray

    def read(uris: list[str]) -> list[Frames | None]:
        return [_read_or_none(uri, framings, storage) for uri in uris]

    task = ray.remote(num_cpus=DATA_CPUS, memory=TASK_MEMORY)(read)
    batches, total, filled = [[]], 0, 0  # type: ignore[var-annotated]
    for image, size in zip(images, sizes, strict=True):
        needed = sum(3 * math.prod(framing.size(*size)) for framing in framings)
        total, filled = total + needed, filled + needed
        if total > most_bytes:
            break
        if batches[-1] and filled > BATCH_BYTES:
            batches.append([])
            filled = needed
        batches[-1].append(image.uri)
    objects = [task.remote(uris) for uris in batches if uris]
    return Kept(framings, objects, places(batches))


def places(batches: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Number of its batch and place in it, by URI."""
    return {uri: (number, row) for number, uris in enumerate(batches) for row, uri in enumerate(uris)}


def _read_or_none(uri: str, framings: tuple[Framing, ...], storage: Storage) -> Frames | None:
    try:
        return _read(uri, framings, storage)
    except (ImageError, StorageError):  # whoever needs it meets the same, and says so
        return None
