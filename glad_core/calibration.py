"""δ, the start step and the decision threshold, from good images and synthetic anomalies alone.

The released code chose these by hand on the test set; here no test image or label is ever seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from glad_core import metrics, synthesis
from glad_core.bundle import Model
from glad_core.detect import Detection, Request, detect, full_size_map
from glad_core.settings import Settings

# The published settings walk 30 timesteps at a time (T = 750, S = 25) and stop searching at 350 / 750 of T.
STRIDE = 30
MIN_STEP_SHARE = 350 / 750
SELECTION_IMAGES = 16  # T is chosen on so many good images; δ and the threshold then use all


def calibrate(
    model: Model,
    good: Sequence[np.ndarray],
    *,
    start_steps: Sequence[int] = (250, 350, 450, 550, 650, 750),
    foreground_mode: synthesis.ForegroundMode = 3,
    target_fpr: float = 0.05,
    batch_size: int = 8,
    seed: int = 0,
    on_image: Callable[[int], None] = lambda done: None,
) -> Settings:
    """Settings of ``model`` with T, S, min_step, δ and the threshold chosen for these good images.

    For every candidate T: δ is the 95 % quantile, over good images, of the largest step score they reach before
    min_step, so that few good images trigger; then the T is taken that best separates good images from the same images
    with synthetic anomalies (image AUROC plus pixel AP on the synthetic masks). The threshold is the conformal
    quantile of the good scores: a new good image exceeds it with probability at most ``target_fpr``, provided there
    are at least 1/target_fpr - 1 good images (with fewer, the largest good score is used).

    Args:
        good: held-out good images, uint8 [R, R, 3] each, not seen in training.
        on_image: called with the number of images judged, `judged_images` in all.
    """
    few = good[:SELECTION_IMAGES]
    anomalous, masks = _synthetic(few, foreground_mode, seed)

    def with_delta(start_step: int, images: Sequence[np.ndarray]) -> Model:
        values = model.settings.model_dump() | {
            "start_step": start_step,
            "inference_steps": max(1, round(start_step / STRIDE)),
            "min_step": round(start_step * MIN_STEP_SHARE),
        }
        # An unreachable δ makes every image walk, and compare, all the way down to min_step.
        walk = Settings(**values | {"delta": 1e4, "saff": False})
        walked = _judge(replace(model, settings=walk), images, batch_size, seed, on_image)
        delta = float(np.quantile([max(score for _, score in image.steps) for image in walked], 0.95))
        return replace(model, settings=Settings(**values | {"delta": delta}))

    best: tuple[float, int] | None = None
    for start_step in start_steps:
        candidate = with_delta(start_step, few)
        goods = _judge(candidate, few, batch_size, seed, on_image)
        bads = _judge(candidate, anomalous, batch_size, seed, on_image)
        quality = _separation(candidate, goods, bads, masks)
        if best is None or quality > best[0]:
            best = (quality, start_step)
    assert best is not None
    chosen = with_delta(best[1], good)
    scores = [image.score for image in _judge(chosen, good, batch_size, seed, on_image)]
    return chosen.settings.model_copy(update={"threshold": conformal_quantile(scores, target_fpr)})


def judged_images(good: int, start_steps: int = 6) -> int:
    """How many images `calibrate` judges, for a progress bar."""
    return 3 * min(good, SELECTION_IMAGES) * start_steps + 2 * good


def conformal_quantile(scores: Sequence[float], target_fpr: float) -> float:
    """The ⌈(n + 1)(1 - α)⌉-th smallest score (split conformal prediction); the largest when n is too small for α."""
    rank = math.ceil((len(scores) + 1) * (1 - target_fpr))
    return float(np.sort(np.asarray(scores, dtype=np.float64))[min(rank, len(scores)) - 1])


def _synthetic(
    good: Sequence[np.ndarray], foreground_mode: synthesis.ForegroundMode, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Each good image with a synthetic anomaly, and the masks [n, R, R]."""
    images = torch.from_numpy(np.stack(good)).permute(0, 3, 1, 2).float() / 127.5 - 1
    foreground = synthesis.foreground(images, foreground_mode) if foreground_mode != 3 else None
    seeds = [seed * 1_000_003 + index for index in range(len(good))]
    anomalous, masks = synthesis.synthesize(
        images, seeds=seeds, textures=None, foreground_BHW=foreground, probability=1.0
    )
    pixels = ((anomalous.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return list(pixels), masks[:, 0].numpy() > 0


def _judge(
    model: Model, images: Sequence[np.ndarray], batch_size: int, seed: int, on_image: Callable[[int], None]
) -> list[Detection]:
    judged: dict[str, Detection] = {}
    requests = [Request(str(index), image) for index, image in enumerate(images)]
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        judged |= {result.image_id: result for result in detect(model, batch, seed)}
        on_image(len(batch))
    return [judged[request.image_id] for request in requests]


def _separation(model: Model, goods: list[Detection], bads: list[Detection], masks: np.ndarray) -> float:
    """Image AUROC plus pixel AP of synthetic anomalies among good images."""
    scores = np.array([image.score for image in goods + bads])
    labels = np.array([0] * len(goods) + [1] * len(bads))
    maps = torch.stack([map_at_full_size(model, image) for image in bads])
    truth = torch.nn.functional.interpolate(
        torch.from_numpy(masks)[:, None].float(), size=maps.shape[-2:], mode="nearest"
    )[:, 0].numpy()
    if not truth.any():
        return metrics.image_metrics(scores, labels)["AUROC"]
    return metrics.image_metrics(scores, labels)["AUROC"] + metrics.pixel_metrics(maps.numpy(), truth > 0)["P-AP"]


def map_at_full_size(model: Model, image: Detection) -> Tensor:
    """The map the score was taken from, float32 [D, D]."""
    kept = torch.from_numpy(image.anomaly_map).float()
    return full_size_map(kept[None], model.settings)[0] if kept.shape[0] != model.settings.feature_resolution else kept
