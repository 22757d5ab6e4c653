"""Good images on their way into training: found, looked through once, then streamed by Ray Data with anomalies in them.

Decoding and synthesis run as tasks on whatever CPUs are free, so that the worker with the GPU only ever takes finished
batches. What a batch holds follows from its place in the sample order alone (`samples.sample_at`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.session import configure_ray_data
from cluster.storage import Storage, is_s3, join, local_path
from glad_core.errors import GladError, did_you_mean
from glad_core.training.recipe import Part, Recipe
from pipelines.archive.decode import FETCH_THREADS, IMAGE_SUFFIXES, ImageError, Picture, decode, fetch
from pipelines.runs.feedback import require_marks
from pipelines.runs.run import Run

if TYPE_CHECKING:
    import torch  # not for all: finding and surveying images starts seconds sooner without

DATA_CPUS = 0.5  # of one decoding and synthesising task
SURVEY_BATCH = 32
HELD_OUT_SHARE, HELD_OUT_MAX = 0.1, 40
MAX_TEXTURES = 500
PREFETCHED = 4  # batches ready ahead of the step
CACHED_IMAGES = 512  # decoded images a task process keeps


@dataclass(frozen=True)
class GoodImage:
    """One good training image."""

    uri: str
    category: str
    digest: str = ""


def good_images(dataset: str, category: str | None, storage: Storage) -> dict[str, list[GoodImage]]:
    """Images of ``train/good`` by category, from an MVTec-AD tree or one category's own folder, local or S3.

    Args:
        category: one, several with commas between, ``all``, or None where there is only one.

    Raises:
        GladError: no such folder or category, or fewer than two images in one.
        StorageError: S3 cannot be used.
    """
    dataset = dataset.rstrip("/") if is_s3(dataset) else local_path(dataset)
    if storage.kind(dataset) != "folder":
        raise GladError(f"{dataset}: no such dataset folder")
    own_name = dataset.rpartition("/")[2]
    folders = {name: join(dataset, name) for name in _trainable(dataset, storage)}
    if not folders:
        if not _is_trainable(dataset, storage):
            raise GladError(f"{dataset}: no category with train/good in it; an MVTec-AD layout is expected")
        folders = {own_name: dataset}
    if category is None and len(folders) > 1:
        raise GladError(f"{dataset} holds {len(folders)} categories ({', '.join(folders)}): pick one with --category")
    wanted = list(folders) if category in (None, "all") else [name.strip() for name in category.split(",")]
    for name in wanted:
        if name not in folders:
            raise GladError(f"{dataset} has no category '{name}'{did_you_mean(name, folders)}")
    found = {}
    for name in wanted:
        good = join(folders[name], "train/good")
        uris = [join(good, path) for path, _ in storage.walk(good)]
        found[name] = [GoodImage(uri, name) for uri in uris if _suffix(uri) in IMAGE_SUFFIXES]
        if len(found[name]) < 2:
            raise GladError(f"{good}: {len(found[name])} good images; at least two are needed, better 50")
    return found


def curated(
    found: dict[str, list[GoodImage]], exclude: str | None, include: str | None, storage: Storage
) -> tuple[dict[str, list[GoodImage]], str]:
    """Good images after what people said of two runs, and one line of what that changed.

    Args:
        exclude: run whose confirmed anomalies are left out.
        include: run whose false alarms are added, to the category they were judged as (the only one, if there is one).

    Raises:
        GladError: a run without feedback, or too few images left.
    """
    if exclude is None and include is None:
        return found, ""
    bad = {row["uri"] for row in _marked(exclude, "confirmed", storage)}
    kept = {name: [image for image in images if image.uri not in bad] for name, images in found.items()}
    left_out = sum(map(len, found.values())) - sum(map(len, kept.values()))
    known = {image.uri for images in found.values() for image in images}
    added, unusable = 0, 0
    for row in _marked(include, "false_alarm", storage):
        category = next(iter(found)) if len(found) == 1 else row["category"]
        if row["uri"] in known | bad:
            continue
        if category not in kept or row["uri"].startswith("tar://"):
            unusable += 1
            continue
        kept[category].append(GoodImage(row["uri"], category))
        added += 1
    for name, images in kept.items():
        if len(images) < 2:
            raise GladError(
                f"{name}: {len(images)} good images left without those confirmed as anomalous; two are needed"
            )
    line = f"feedback: {left_out} good images left out, {added} added"
    return kept, line + (f", {unusable} of another category or inside a tar not added" if unusable else "")


def _marked(run: str | None, verdict: str, storage: Storage) -> list[dict[str, Any]]:
    marks = [] if run is None else require_marks(Run.at(run, storage))
    return sorted((row for row in marks if row["verdict"] == verdict), key=lambda row: row["uri"])


def _trainable(dataset: str, storage: Storage) -> list[str]:
    return [name for name in storage.folders(dataset) if _is_trainable(join(dataset, name), storage)]


def _is_trainable(folder: str, storage: Storage) -> bool:
    return storage.kind(join(folder, "train/good")) == "folder"


def _suffix(uri: str) -> str:
    return "." + uri.rpartition(".")[2].lower()


@dataclass(frozen=True)
class Survey:
    """What training has to work with: images to train on, others held out to calibrate on, and those skipped.

    ``skipped`` holds (uri, reason); ``sizes`` the different "width x height" met; ``fingerprint`` is a hash of the
    decoded pixels of all usable images.
    """

    fit: list[GoodImage]
    held_out: list[GoodImage]
    skipped: list[tuple[str, str]]
    sizes: list[str]
    fingerprint: str


def survey(found: dict[str, list[GoodImage]], resolution: int, storage: Storage) -> Survey:
    """Decode every image once: who is readable, and the fingerprint of the dataset.

    Held out is a tenth of each category, at least one image and at most 40; which ones depends on their names, so an
    image mostly stays on its side when others join.

    Raises:
        GladError: fewer than two readable images in a category.
    """
    import ray.data

    images = [image for category in found.values() for image in category]

    def look(batch: dict[str, Any]) -> dict[str, Any]:
        looks = [_look(storage, str(uri), resolution) for uri in batch["uri"]]
        return {"uri": batch["uri"]} | {name: [look[name] for look in looks] for name in looks[0]}

    rows = ray.data.from_items(
        [{"uri": image.uri} for image in images], override_num_blocks=max(1, len(images) // SURVEY_BATCH)
    ).map_batches(look, batch_size=SURVEY_BATCH, num_cpus=DATA_CPUS)
    seen = {row["uri"]: row for row in rows.iter_rows()}
    skipped = [(image.uri, seen[image.uri]["reason"]) for image in images if not seen[image.uri]["digest"]]
    fit: list[GoodImage] = []
    held_out: list[GoodImage] = []
    for category, members in found.items():
        usable = [GoodImage(i.uri, category, seen[i.uri]["digest"]) for i in members if seen[i.uri]["digest"]]
        if len(usable) < 2:
            reason = next((f"; {uri}: {why}" for uri, why in skipped), "")
            raise GladError(f"{category}: {len(usable)} readable good images; at least two are needed{reason}")
        order = sorted(usable, key=lambda image: hashlib.sha256(image.uri.rpartition("/")[2].encode()).digest())
        count = min(HELD_OUT_MAX, max(1, round(len(order) * HELD_OUT_SHARE)))
        held_out += order[:count]
        fit += sorted(order[count:], key=lambda image: image.uri)
    digests = sorted(f"{image.category}:{image.digest}" for image in [*fit, *held_out])
    sizes = sorted({row["size"] for row in seen.values() if row["size"]})
    return Survey(fit, held_out, skipped, sizes, hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16])


def _look(storage: Storage, uri: str, resolution: int) -> dict[str, str]:
    try:
        picture = _read(storage, uri, resolution)
    except ImageError as error:
        return {"digest": "", "reason": str(error), "size": ""}
    size = f"{picture.width} x {picture.height}"
    return {"digest": hashlib.sha256(picture.pixels.tobytes()).hexdigest(), "reason": "", "size": size}


def read_pixels(images: Sequence[GoodImage], resolution: int, storage: Storage) -> list[np.ndarray]:
    """Decoded images, uint8 [R, R, 3] each."""
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        return list(pool.map(lambda image: _read(storage, image.uri, resolution).pixels, images))


def batches(
    images: list[GoodImage],
    recipe: Recipe,
    part: Part,
    resolution: int,
    storage: Storage,
    textures: str | None,
    *,
    first_step: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """This worker's share of every step from ``first_step`` on, as `samples.make_rows` makes it, in order."""
    import ray.data
    import torch

    configure_ray_data()
    share = recipe.batch_size // world
    positions = [
        {"position": step * recipe.batch_size + rank * share + place}
        for step in range(first_step, recipe.steps)
        for place in range(share)
    ]
    if not positions:
        return

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch  # again: Ray Data's own actor takes this function in and need not import what the tasks do

        from glad_core.training import samples

        torch.set_num_threads(1)
        chosen = [samples.sample_at(recipe, int(position), len(images)) for position in batch["position"]]
        pixels = [_read(storage, images[sample.index].uri, resolution).pixels for sample in chosen]
        pool = _texture_pool(storage, textures, resolution) if textures else None
        return samples.make_rows(pixels, chosen, recipe, part, pool)

    # Items need no read task, which would ask for a whole CPU. A task makes two steps' worth.
    rows = ray.data.from_items(positions, override_num_blocks=max(1, len(positions) // (2 * share)))
    rows.context.execution_options.preserve_order = True
    made = rows.map_batches(make, batch_size=share, num_cpus=DATA_CPUS)
    # A split is run by an actor of its own: Ray Data's loop would contend with the training loop for the interpreter.
    stream = made.streaming_split(1)[0]
    for batch in stream.iter_batches(batch_size=share, prefetch_batches=PREFETCHED, batch_format="numpy"):
        yield {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}


@lru_cache(maxsize=CACHED_IMAGES)
def _read(storage: Storage, uri: str, resolution: int) -> Picture:
    return decode(fetch(storage, {"uri": uri, "size": None}), resolution)


@lru_cache(maxsize=1)
def _texture_pool(storage: Storage, folder: str, resolution: int) -> torch.Tensor:
    return load_textures(folder, resolution, storage)


def load_textures(folder: str, resolution: int, storage: Storage, limit: int = MAX_TEXTURES) -> torch.Tensor:
    """The first ``limit`` readable images below a folder, local or S3: uint8 [M, R, R, 3].

    Raises:
        GladError: no image there.
    """
    import torch

    pool: list[np.ndarray] = []
    for path, size in storage.walk(folder):
        if len(pool) == limit:
            break
        try:
            pool.append(decode(fetch(storage, {"uri": join(folder, path), "size": size}), resolution).pixels)
        except ImageError:
            continue
    if not pool:
        raise GladError(f"{folder}: no texture images in it; name a folder of pictures such as DTD's")
    return torch.from_numpy(np.stack(pool))
