"""`glad score --method nearest`: the memory of good patches, built once per job and shared by its actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cluster.storage import Storage
from glad_core.bundle.good_scores import kept, p_value
from glad_core.bundle.memory import PatchMemory, memory_of, memory_tensors
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Settings
from glad_core.bundle.weights import not_finite
from glad_core.decoding.opened import pages
from glad_core.decoding.picture import ImageError, decode
from glad_core.errors import GladError
from glad_core.good_patches import GoodPicture, remember
from glad_core.stitch import combined_score, standards
from glad_core.threshold import TARGET_FPR, conformal_quantile, images_needed
from glad_core.views import Frames, Framing
from pipelines.archive.fetch import AT_HAND, fetch, neighbours
from pipelines.archive.rows import LeftOut
from pipelines.archive.sources import list_source
from pipelines.models.find import local_bundle

MAX_IMAGES = 500
MAX_BYTES = 2 * 2**30  # of their frames


@dataclass(frozen=True)
class Memory:
    """Remembered patches of every view, the scores of good images there, and a threshold.

    ``good`` holds mean and spread of every view, by which several are standardised (`stitch`), ``scores`` those of good
    images judged by others' patches (`GoodPatches.scores`), ascending. 5 % of good images exceed the threshold; it is
    None if there were too few images.
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
    """Build the memory of good images and write it to ``out``; returns a line on what was taken and left out, and
    another if the threshold is doubtful.

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
    pictures, left_out = _read(good, s.framings(), storage)
    if len(pictures) < 2:
        raise GladError(
            f"{good}: {len(pictures)} readable good images; at least two are needed, better 50" + _listed(left_out)
        )
    patches = remember(replace(model, settings=s), pictures, seed)
    scores = patches.scores(seed)
    memory = Memory(patches.memory, standards(scores), None, [])
    settings = memory.settings(s)
    combined = [combined_score(settings, row) for row in scores.tolist()]
    tensors = memory_tensors(patches.memory)
    tensors["scores"] = torch.tensor(kept(combined))
    tensors["good"] = torch.tensor(memory.good, dtype=torch.float64)
    if len(combined) >= images_needed(TARGET_FPR):
        tensors["threshold"] = torch.tensor([conformal_quantile(combined, TARGET_FPR)], dtype=torch.float64)
    storage.write(out, save(tensors))
    few = "" if "threshold" in tensors else f", too few for one: give {images_needed(TARGET_FPR)}"
    taken = f"{len(pictures)} good images, {len(combined)} of them judged for the threshold{few}" + _listed(left_out)
    return f"{taken}\n{patches.doubt}" if patches.doubt else taken


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


def _listed(left_out: Counter[str]) -> str:
    return "; left out: " + ", ".join(f"{count} {kind}" for kind, count in left_out.most_common()) if left_out else ""


def _read(good: str, framings: Sequence[Framing], storage: Storage) -> tuple[list[GoodPicture], Counter[str]]:
    """The good images, and what was left out, by the kind of its error or the reason."""
    images: list[GoodPicture] = []
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
            frames = Frames(picture.frames, (picture.height, picture.width))
            images.append(GoodPicture(row["uri"], row["uri"].rpartition("/")[0], frames))
            others[0] = row
            left_out["further pages"] += further
        except ImageError as error:
            left_out[error.kind] += 1  # a bad file among the good images; scoring would not judge it either
    left_out += unlisted.others + Counter({"listed twice": unlisted.duplicates, "empty entries": unlisted.blank})
    return images, +left_out
