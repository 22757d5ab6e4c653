"""`glad score --method nearest`: the memory of good patches, built once per job and shared by its actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cluster.storage import Storage
from glad_core.bundle.good_scores import kept, p_value
from glad_core.bundle.memory import PatchMemory, memory_of, memory_tensors
from glad_core.bundle.model import Model, load_bundle
from glad_core.bundle.settings import Settings
from glad_core.bundle.weights import not_finite
from glad_core.decoding.opened import pages
from glad_core.decoding.picture import ImageError, decode
from glad_core.engine import nearest
from glad_core.errors import GladError
from glad_core.held_out import held_out_count
from glad_core.images import to_tensor
from glad_core.stitch import combined_score, standards, tile_requests, view_scores
from glad_core.threshold import TARGET_FPR, conformal_quantile, images_needed
from glad_core.verdict import NotFinite, finite
from glad_core.views import Framing
from pipelines.archive.fetch import AT_HAND, fetch, neighbours
from pipelines.archive.rows import LeftOut
from pipelines.archive.sources import list_source
from pipelines.models.find import local_bundle

MAX_IMAGES = 500
MAX_BYTES = 2 * 2**30  # of their frames
MAX_TILES = 2000  # of a view, from which the memory is chosen
BATCH = 8  # images per call of the networks
HELD_OUT_SHARE = 0.2  # of the images, for the threshold


@dataclass(frozen=True)
class Good:
    """A good image: its URI, its frame in every view, its height and width."""

    uri: str
    frames: list[np.ndarray]
    size: tuple[int, int]


@dataclass(frozen=True)
class Memory:
    """Remembered patches of every view, the scores of good images there, and a threshold.

    ``good`` holds mean and spread of every view, by which several are standardised (`stitch`), ``scores`` what came of
    the held-out images, ascending. 5 % of good images exceed the threshold; it is None if there were too few images.
    """

    patches: list[PatchMemory]
    good: list[tuple[float, float]]
    threshold: float | None
    scores: list[float]

    def p_value(self, score: float, category: str | None) -> float | None:
        """The conformal p-value of a score, whatever the category: the memory is that of all."""
        return p_value(score, self.scores)

    def settings(self, settings: Settings) -> Settings:
        """Settings of the method, whose views are standardised by this memory's good images."""
        settings = settings.judged_by("nearest")
        views = [
            view.model_copy(update={"good_mean": mean, "good_spread": spread})
            for view, (mean, spread) in zip(settings.views, self.good, strict=True)
        ]
        return settings.model_copy(update={"views": tuple(views)})


def build_memory(good: str, bundle: str, model_id: str, storage: Storage, out: str, device: str, seed: int) -> str:
    """Build the memory of good images and write it to ``out``; returns a line on what was taken and left out.

    The images are at most `MAX_IMAGES`, and fewer if their frames exceed `MAX_BYTES`.

    Args:
        good: source of the good images.
        bundle: location of the bundle whose features are compared.
        model_id: of that bundle when the job began.

    Raises:
        GladError: fewer than two readable images in ``good``, one without finite features, or another bundle.
    """
    model = load_bundle(local_bundle(bundle, storage), device, model_id=model_id)
    s = model.settings.judged_by("nearest")
    model = replace(model, settings=s)
    images, left_out = _read(good, s.framings(), storage)
    if len(images) < 2:
        raise GladError(
            f"{good}: {len(images)} readable good images; at least two are needed, better 50" + _listed(left_out)
        )
    order = np.random.default_rng(seed).permutation(len(images))
    held_out = held_out_count(len(images), HELD_OUT_SHARE)
    fit = [images[index] for index in order[held_out:]]
    patches = remember(model, fit, seed)
    scores = [_scores(model, patches, images[index]) for index in order[:held_out]]
    memory = Memory(patches, standards(np.array(scores)), None, [])
    settings = memory.settings(s)
    combined = [combined_score(settings, row) for row in scores]
    tensors = memory_tensors(patches)
    tensors["scores"] = torch.tensor(kept(combined))
    tensors["good"] = torch.tensor(memory.good, dtype=torch.float64)
    if len(combined) >= images_needed(TARGET_FPR):
        tensors["threshold"] = torch.tensor([conformal_quantile(combined, TARGET_FPR)], dtype=torch.float64)
    storage.write(out, save(tensors))
    few = "" if "threshold" in tensors else f", too few for one: give {3 * images_needed(TARGET_FPR)}"
    return f"{len(images)} good images, {held_out} of them for the threshold{few}" + _listed(left_out)


def remember(model: Model, images: Sequence[Good], seed: int) -> list[PatchMemory]:
    """The good patches to remember of every view.

    Raises:
        GladError: an image has no finite features.
    """
    views = range(len(model.settings.views))
    return [nearest.remember(_features(model, images, view, seed), seed) for view in views]


def read_memory(location: str, storage: Storage) -> Memory:
    """Read what `build_memory` wrote.

    Raises:
        GladError: something else is there.
    """
    try:
        tensors = load(storage.read(location))
        good = [(float(mean), float(spread)) for mean, spread in tensors["good"]]
        patches = memory_of({name: kept for name, kept in tensors.items() if "." in name}, len(good))
        damaged = not patches or not_finite(tensors.items()) is not None
        threshold = float(tensors["threshold"]) if "threshold" in tensors else None
        scores = sorted(map(float, tensors["scores"]))
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, GladError):
        damaged = True
    if damaged:
        raise GladError(f"{location}: damaged; give --overwrite to begin anew")
    return Memory(patches, good, threshold, scores)


def _features(model: Model, images: Sequence[Good], view: int, seed: int) -> Tensor:
    """Patch features [P, D] of the good images in one view: as many random ones as `nearest.remember` considers.

    Raises:
        GladError: an image has none that are finite.
    """
    generator = torch.Generator().manual_seed(seed)
    tiles = [
        (image.uri, request.image)
        for image in images
        for request in tile_requests(image.uri, image.frames, model.settings, image.size)[view]
    ]
    chosen = [tiles[index] for index in torch.randperm(len(tiles), generator=generator)[:MAX_TILES].tolist()]
    share = -(-nearest.CANDIDATES // len(chosen))  # patches of each tile: all of them together may be gigabytes
    parts = []
    for start in range(0, len(chosen), BATCH):
        uris, pixels = zip(*chosen[start : start + BATCH], strict=True)
        features_BND = nearest.patch_features(model, to_tensor(pixels))
        _refuse(model.model_id, [uris[row] for row in (~features_BND.isfinite().all((1, 2))).nonzero()])
        for features_ND in features_BND:
            some = torch.randperm(len(features_ND), generator=generator)[:share]
            parts.append(features_ND[some.to(features_ND.device)])
    return torch.cat(parts)


def _scores(model: Model, patches: Sequence[PatchMemory], image: Good) -> list[float]:
    """The score of a good image in every view.

    Raises:
        GladError: it has none that is finite.
    """
    s = model.settings
    by_view = tile_requests(image.uri, image.frames, s, image.size)
    judged = [
        [
            finite(detection)
            for start in range(0, len(requests), BATCH)
            for detection in nearest.detect_nearest(model, kept, requests[start : start + BATCH])
        ]
        for kept, requests in zip(patches, by_view, strict=True)
    ]
    if any(isinstance(verdict, NotFinite) for verdicts in judged for verdict in verdicts):
        _refuse(model.model_id, [image.uri])
    return view_scores(s, image.size, judged)  # type: ignore[arg-type]


def _refuse(model_id: str, uris: list[str]) -> None:
    if uris:
        raise GladError(
            f"the features of model {model_id} are not finite for {len(uris)} good images, such as {uris[0]}: "
            "leave them out, or take another bundle"
        )


def _listed(left_out: Counter[str]) -> str:
    return "; left out: " + ", ".join(f"{count} {kind}" for kind, count in left_out.most_common()) if left_out else ""


def _read(good: str, framings: Sequence[Framing], storage: Storage) -> tuple[list[Good], Counter[str]]:
    """The good images, and what was left out, by the kind of its error or the reason."""
    images: list[Good] = []
    held, unlisted = 0, LeftOut()
    left_out: Counter[str] = Counter()
    rows = list_source(good, None, storage, left_out=unlisted)
    others = list(islice(rows, AT_HAND))
    for row in chain(list(others), rows):
        if len(images) == MAX_IMAGES or held > MAX_BYTES:
            left_out[f"or more after the first {len(images)} images, which are enough"] += 1
            break
        if row.get("error_type"):
            left_out[row["error_type"]] += 1
            continue
        try:
            data = fetch(storage, row, partial(neighbours, row, others))
            picture, further = decode(data, framings), len(pages(data)[0]) - 1
            held += sum(frame.nbytes for frame in picture.frames)
            images.append(Good(row["uri"], picture.frames, (picture.height, picture.width)))
            others[0] = row
            left_out["further pages"] += further
        except ImageError as error:
            left_out[error.kind] += 1  # a bad file among the good images; scoring would not judge it either
    left_out += unlisted.others + Counter({"listed twice": unlisted.duplicates, "empty entries": unlisted.blank})
    return images, +left_out
