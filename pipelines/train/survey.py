"""The survey of good images before training: which are readable, and which are held out for calibration."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.storage import Storage
from glad_core.decoding.opened import ImageError, pages
from glad_core.decoding.picture import decode
from glad_core.errors import GladError
from glad_core.name_order import name_order
from glad_core.views import Frames, Framing
from pipelines.archive.fetch import Row, fetch, neighbours
from pipelines.train.good_images import GoodImage
from pipelines.train.kept_frames import DATA_CPUS, TASK_MEMORY, Kept, places

BATCH = 32  # images decoded in one call
HELD_OUT_SHARE, HELD_OUT_MAX = 0.1, 40  # of a category's images
NEEDED = 19  # for a false-positive rate of 5 % (`threshold.images_needed`)
RUNS = 4  # of held-out images, unless there are fewer


@dataclass(frozen=True)
class Survey:
    """The images to train on, those held out for calibration, and those skipped.

    ``skipped`` holds (URI, reason); ``sizes`` the different "width x height" of all images; ``fingerprint`` is a hash
    of the decoded pixels of all usable images. ``shapes`` are their heights and widths.
    ``peaks`` are the largest stored values of those of more than 8 bits. ``paged`` are the URIs of files with further
    pages, which are not trained on. ``kept`` are the frames seen, in Ray's store.
    """

    fit: list[GoodImage]
    held_out: list[GoodImage]
    skipped: list[tuple[str, str]]
    sizes: list[str]
    fingerprint: str
    shapes: list[tuple[int, int]]
    peaks: list[float] = field(default_factory=list)
    paged: list[str] = field(default_factory=list)
    kept: Kept | None = None

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


def survey(candidates: dict[str, list[GoodImage]], resolution: int, storage: Storage, most_bytes: int = 0) -> Survey:
    """Decode every image once, in Ray tasks, as one square each; ``most_bytes`` of the squares are kept.

    Held out is a tenth of each category, more if there are few (`held_out_count`) and at most 40, in runs of
    consecutive names: photos taken one after the other often show the same piece, and one of a remembered piece says
    little about new ones. The choice of the runs depends on names, so that most stay on their side when images are
    added at the end.

    Raises:
        GladError: fewer than two readable images in a category.
    """
    uris = [image.uri for images in candidates.values() for image in images]
    rows, kept = _examine(uris, resolution, storage, most_bytes)
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
        count = held_out_count(len(usable))
        order = _by_runs(usable, max(1, count // RUNS))
        held_out += order[:count]
        fit += sorted(order[count:], key=lambda image: image.uri)
    sizes = sorted({row["size"] for row in rows.values() if row["size"]})
    shapes = [(int(height), int(width)) for image in [*fit, *held_out] for width, height in [_parts(rows[image.uri])]]
    peaks = [float(rows[image.uri]["peak"]) for image in [*fit, *held_out] if rows[image.uri]["peak"]]
    paged = [image.uri for image in [*fit, *held_out] if rows[image.uri]["pages"] != "1"]
    return Survey(fit, held_out, skipped, sizes, _fingerprint([*fit, *held_out]), shapes, peaks, paged, kept)


def held_out_count(images: int) -> int:
    """How many of a category's good images are held out: a tenth, at most 40, or as many as a threshold of 5 % needs.

    A new good image exceeds the largest of n scores with probability 1 / (n + 1), so a tenth of few images would make a
    threshold that many good ones exceed. To leave most for the model, no more than a third is held out for that reason;
    one at least.
    """
    return min(HELD_OUT_MAX, max(1, round(images * HELD_OUT_SHARE), min(NEEDED, images // 3)))


def _by_runs(images: Sequence[GoodImage], length: int) -> list[GoodImage]:
    """The images in runs of ``length`` consecutive names, ordered by hashes of the runs' first names."""
    named = sorted(images, key=lambda image: name_order(image.uri))
    runs = [named[start : start + length] for start in range(0, len(named), length)]
    runs.sort(key=lambda run: hashlib.sha256(run[0].uri.rpartition("/")[2].encode()).digest())
    return [image for run in runs for image in run]


def _parts(row: dict[str, str]) -> list[str]:
    return row["size"].split(" x ")


def _examine(
    uris: list[str], resolution: int, storage: Storage, most_bytes: int
) -> tuple[dict[str, dict[str, str]], Kept]:
    """Digest, size and reason of failure of every image, by URI; and the first images' frames."""
    import ray

    framings = (Framing("squash", resolution, white=0),)  # the white level is not known yet

    def examine(batch: list[str], keep: bool) -> tuple[list[dict[str, str]], list[Frames | None]]:
        near = [{"uri": uri} for uri in batch]
        rows, frames = zip(*(_examine_one(storage, row, near, framings) for row in near), strict=True)
        return list(rows), list(frames) if keep else []

    task = ray.remote(num_cpus=DATA_CPUS, memory=TASK_MEMORY, num_returns=2)(examine)
    batches = [uris[start : start + BATCH] for start in range(0, len(uris), BATCH)]
    count = most_bytes // (BATCH * 3 * resolution**2)
    results: list[Any] = [task.remote(batch, number < count) for number, batch in enumerate(batches)]
    rows = ray.get([row for row, _ in results])
    kept = Kept(framings, [frames for _, frames in results[:count]], places(batches[:count]))
    return dict(zip(uris, (row for batch in rows for row in batch), strict=True)), kept


def _examine_one(
    storage: Storage, row: Row, near: list[Row], framings: Sequence[Framing]
) -> tuple[dict[str, str], Frames | None]:
    try:
        data = fetch(storage, row, lambda: neighbours(row, near))
        picture, numbers = decode(data, framings), pages(data)[0]
    except ImageError as error:
        return {"digest": "", "reason": str(error), "size": "", "peak": "", "pages": ""}, None
    digest = hashlib.sha256(picture.pixels.tobytes()).hexdigest()
    size = f"{picture.width} x {picture.height}"
    found = {"digest": digest, "reason": "", "size": size, "peak": str(picture.peak or "")}
    found["pages"] = str(len(numbers))
    return found, Frames(picture.frames, (picture.height, picture.width))


def _fingerprint(images: list[GoodImage]) -> str:
    digests = sorted(f"{image.category}:{image.digest}" for image in images)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
