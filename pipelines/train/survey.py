"""The survey of good images before training: which are readable, and which are held out for calibration."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from cluster.storage import Storage, StorageError
from glad_core.errors import GladError
from glad_core.views import Framing
from pipelines.archive.fetch import Row, fetch, neighbours
from pipelines.archive.picture import ImageError, decode
from pipelines.train.good_images import GoodImage
from pipelines.train.pixels import read_picture

DATA_CPUS = 0.5  # of a task that decodes images
# Bytes that every process of a run asks Ray for: a machine that declares no memory for work, as a head may, gets none.
TASK_MEMORY = 500_000_000
BATCH = 32  # images decoded in one call
HELD_OUT_SHARE, HELD_OUT_MAX = 0.1, 40  # of a category's images


@dataclass(frozen=True)
class Survey:
    """The images to train on, those held out for calibration, and those skipped.

    ``skipped`` holds (URI, reason); ``sizes`` the different "width x height" of all images; ``fingerprint`` is a hash
    of the decoded pixels of all usable images. ``shapes`` are their heights and widths.
    ``peaks`` are the largest stored values of those of more than 8 bits.
    """

    fit: list[GoodImage]
    held_out: list[GoodImage]
    skipped: list[tuple[str, str]]
    sizes: list[str]
    fingerprint: str
    shapes: list[tuple[int, int]]
    peaks: list[float] = field(default_factory=list)

    @property
    def white_level(self) -> float | None:
        """The white of pictures of more than 8 bits: the end of the range of as many bits as they use, 8 at least.

        Of fractions 1; None if all pictures have 8 bits.
        """
        if not self.peaks:
            return None
        peak = max(self.peaks)
        return 1.0 if peak <= 1 else float(2 ** max(8, math.ceil(math.log2(peak + 1))) - 1)

    @property
    def dark_level(self) -> float | None:
        """Half the peak of the darkest of them."""
        return min(self.peaks) / 2 or None if self.peaks else None


def survey(candidates: dict[str, list[GoodImage]], resolution: int, storage: Storage) -> Survey:
    """Decode every image once, in Ray tasks.

    Held out is a tenth of each category, at least one image and at most 40. The choice depends on the images' names, so
    that an image mostly stays on its side when others are added.

    Raises:
        GladError: fewer than two readable images in a category.
    """
    rows = _examine([image.uri for images in candidates.values() for image in images], resolution, storage)
    skipped = [
        (image.uri, rows[image.uri]["reason"])
        for images in candidates.values()
        for image in images
        if not rows[image.uri]["digest"]
    ]
    fit: list[GoodImage] = []
    held_out: list[GoodImage] = []
    for category, images in candidates.items():
        digests = {image.uri: rows[image.uri]["digest"] for image in images}
        usable = [GoodImage(uri, category, digest) for uri, digest in digests.items() if digest]
        if len(usable) < 2:
            reason = next((f"; {uri}: {why}" for uri, why in skipped), "")
            raise GladError(f"{category}: {len(usable)} readable good images; at least two are needed{reason}")
        order = sorted(usable, key=lambda image: hashlib.sha256(image.uri.rpartition("/")[2].encode()).digest())
        count = min(HELD_OUT_MAX, max(1, round(len(order) * HELD_OUT_SHARE)))
        held_out += order[:count]
        fit += sorted(order[count:], key=lambda image: image.uri)
    sizes = sorted({row["size"] for row in rows.values() if row["size"]})
    shapes = [(int(height), int(width)) for image in [*fit, *held_out] for width, height in [_parts(rows[image.uri])]]
    peaks = [float(rows[image.uri]["peak"]) for image in [*fit, *held_out] if rows[image.uri]["peak"]]
    return Survey(fit, held_out, skipped, sizes, _fingerprint([*fit, *held_out]), shapes, peaks)


def _parts(row: dict[str, str]) -> list[str]:
    return row["size"].split(" x ")


def _examine(uris: list[str], resolution: int, storage: Storage) -> dict[str, dict[str, str]]:
    """Digest, size and reason of failure of every image, by URI."""
    import ray

    def examine(batch: list[str]) -> list[dict[str, str]]:
        near = [{"uri": uri} for uri in batch]
        return [_examine_one(storage, row, near, resolution) for row in near]

    task = ray.remote(num_cpus=DATA_CPUS, memory=TASK_MEMORY)(examine)
    batches = [uris[start : start + BATCH] for start in range(0, len(uris), BATCH)]
    rows = ray.get([task.remote(batch) for batch in batches])
    return dict(zip(uris, (row for batch in rows for row in batch), strict=True))


def _examine_one(storage: Storage, row: Row, near: list[Row], resolution: int) -> dict[str, str]:
    framings = (Framing("squash", resolution, white=0),)  # the white level is not known yet
    try:
        try:
            picture = read_picture(storage, row["uri"], framings)
        except StorageError:  # unless it is this image's own fault
            picture = decode(fetch(storage, row, lambda: neighbours(row, near)), framings)
    except ImageError as error:
        return {"digest": "", "reason": str(error), "size": "", "peak": ""}
    digest = hashlib.sha256(picture.pixels.tobytes()).hexdigest()
    size = f"{picture.width} x {picture.height}"
    return {"digest": digest, "reason": "", "size": size, "peak": str(picture.peak or "")}


def _fingerprint(images: list[GoodImage]) -> str:
    digests = sorted(f"{image.category}:{image.digest}" for image in images)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
