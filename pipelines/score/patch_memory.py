"""`glad score --method nearest`: the memory of good patches, built once per job and shared by its actors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cluster.storage import Storage
from glad_core.bundle.model import load_bundle
from glad_core.bundle.weights import not_finite
from glad_core.calibration import conformal_quantile, images_needed
from glad_core.engine import nearest
from glad_core.errors import GladError
from glad_core.images import to_tensor
from glad_core.verdict import Detection, Request, finite
from pipelines.archive.fetch import AT_HAND, fetch, neighbours
from pipelines.archive.picture import ImageError, decode
from pipelines.archive.sources import list_source
from pipelines.models.find import local_bundle

MAX_IMAGES = 500
BATCH = 8  # images per call of the networks
HELD_OUT_SHARE = 0.2  # of the images, for the threshold
TARGET_FPR = 0.05


@dataclass(frozen=True)
class Memory:
    """Remembered patches [M, D] and a threshold that 5 % of good images exceed, None if there were too few images."""

    patches: Tensor
    threshold: float | None


def build_memory(good: str, bundle: str, model_id: str, storage: Storage, out: str, device: str, seed: int) -> int:
    """Build the memory from up to `MAX_IMAGES` good images and write it to ``out``; returns how many images it holds.

    Args:
        good: source of the good images.
        bundle: location of the bundle whose features are compared.
        model_id: of that bundle when the job began.

    Raises:
        GladError: fewer than two readable images in ``good``, one without finite features, or another bundle.
    """
    model = load_bundle(local_bundle(bundle, storage), device, model_id=model_id)
    images = _read(good, model.settings.resolution, storage)
    if len(images) < 2:
        raise GladError(f"{good}: {len(images)} readable good images; at least two are needed, better 50")
    order = np.random.default_rng(seed).permutation(len(images))
    held_out = max(1, round(len(images) * HELD_OUT_SHARE))
    uris, fit = zip(*(images[index] for index in order[held_out:]), strict=True)
    parts = [
        nearest.patch_features(model, to_tensor(fit[start : start + BATCH])) for start in range(0, len(fit), BATCH)
    ]
    features_BND = torch.cat(parts)
    _refuse(model.model_id, [uris[row] for row in (~features_BND.isfinite().all((1, 2))).nonzero()])
    patches = nearest.remember(features_BND.flatten(0, 1), seed)
    requests = [Request(*images[index]) for index in order[:held_out]]
    verdicts = [finite(detection) for detection in nearest.detect_nearest(model, patches, requests)]
    scores = {verdict.image_id: verdict.score for verdict in verdicts if isinstance(verdict, Detection)}
    _refuse(model.model_id, [request.image_id for request in requests if request.image_id not in scores])
    tensors = {"patches": patches.half().cpu().contiguous()}
    if len(scores) >= images_needed(TARGET_FPR):
        tensors["threshold"] = torch.tensor(
            [conformal_quantile(list(scores.values()), TARGET_FPR)], dtype=torch.float64
        )
    storage.write(out, save(tensors))
    return len(fit)


def read_memory(location: str, storage: Storage) -> Memory:
    """Read what `build_memory` wrote.

    Raises:
        GladError: something else is there.
    """
    try:
        tensors = load(storage.read(location))
        damaged = tensors["patches"].ndim != 2 or not_finite(tensors.items()) is not None
        threshold = float(tensors["threshold"]) if "threshold" in tensors else None
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        damaged = True
    if damaged:
        raise GladError(f"{location}: damaged; give --overwrite to begin anew")
    return Memory(tensors["patches"], threshold)


def _refuse(model_id: str, uris: list[str]) -> None:
    if uris:
        raise GladError(
            f"the features of model {model_id} are not finite for {len(uris)} good images, such as {uris[0]}: "
            "leave them out, or take another bundle"
        )


def _read(good: str, resolution: int, storage: Storage) -> list[tuple[str, np.ndarray]]:
    """URI and pixels of the good images."""
    images: list[tuple[str, np.ndarray]] = []
    rows = list_source(good, None, storage)
    others = list(islice(rows, AT_HAND))
    for row in chain(list(others), rows):
        if len(images) == MAX_IMAGES:
            break
        if row.get("error_type"):
            continue
        try:
            images.append(
                (row["uri"], decode(fetch(storage, row, partial(neighbours, row, others)), resolution).pixels)
            )
            others[0] = row
        except ImageError:
            continue  # a bad file among the good images; scoring would not judge it either
    return images
