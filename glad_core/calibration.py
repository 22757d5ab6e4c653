"""δ, the start step and the decision threshold, from good images and synthetic anomalies alone.

The released code chose these by hand on the test set; here no test image or label is ever seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glad_core import synthesis
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Profile, Settings
from glad_core.engine.base import run
from glad_core.engine.engine import Engine
from glad_core.engine.search import fit_guess, largest_fall
from glad_core.foreground import ForegroundMode, foreground
from glad_core.image_metrics import auroc_of_resamples, image_metrics
from glad_core.images import to_tensor
from glad_core.pixel_metrics import PixelCounts
from glad_core.scoring import full_size_map
from glad_core.verdict import Detection, Request

# The published settings walk 30 timesteps at a time (T = 750, S = 25) and stop searching at 350 / 750 of T.
STRIDE = 30
MIN_STEP_SHARE = 350 / 750
START_STEPS = (250, 350, 450, 550, 650, 750)  # the candidates for T
FAST_STEPS = (50, 100, 150, 200, 250, 300)  # and for the one step of profile `fast`
SELECTION_IMAGES = 16  # T is chosen on so many good images; δ and the threshold then use all


def choose_steps(
    model: Model,
    good: Sequence[np.ndarray],
    *,
    categories: Sequence[str] | None = None,
    profile: Profile = "exact",
    start_steps: Sequence[int] | None = None,
    foreground_mode: ForegroundMode = 3,
    batch_size: int = 8,
    seed: int = 0,
    on_image: Callable[[int], None] = lambda done: None,
) -> Settings:
    """Settings of ``model`` with T, S, min_step and δ chosen for these good images; the threshold stays.

    For every candidate T: δ is the 95 % quantile, over good images, of the largest step score they reach before
    min_step, so that few good images trigger; then the T is taken that best separates good images from the same images
    with synthetic anomalies (image AUROC plus pixel AP on the synthetic masks). The largest fall of a score on the way
    becomes the bound of the guarded search (`search`); its guess of where δ was passed is fitted to the good images and
    the same with anomalies. Profile `fast` has no steps, only T is chosen.

    Args:
        good: held-out good images, uint8 [R, R, 3] each, not seen in training.
        categories: of the images, where the bundle serves several.
        on_image: called with the number of images judged, `judged_images` less the last round in all.
    """
    kinds = list(categories) if categories is not None else [model.category] * len(good)
    # Evenly spread, so that every category has its say.
    picked = [round(place) for place in np.linspace(0, len(good) - 1, min(len(good), SELECTION_IMAGES))]
    few, few_kinds = [good[index] for index in picked], [kinds[index] for index in picked]
    anomalous, masks = _synthetic(few, foreground_mode, seed)

    def candidate(start_step: int) -> Settings:
        values = model.settings.model_dump() | {"profile": profile, "start_step": start_step}
        values |= {"score_fall": None, "score_guess": None}
        if profile == "fast":
            return Settings(**values | {"inference_steps": 1, "min_step": 0, "delta": 0.0})
        values |= {
            "inference_steps": max(1, round(start_step / STRIDE)),
            "min_step": round(start_step * MIN_STEP_SHARE),
        }
        return Settings(**values)

    def walk(settings: Settings, images: Sequence[np.ndarray], kinds: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Step scores and departures [N, S] of images that an unreachable δ makes go, compared, down to min_step."""
        unstopped = settings.model_copy(update={"delta": 1e4, "saff": False})
        judged = _judge(replace(model, settings=unstopped), images, kinds, batch_size, seed, on_image)
        scores = np.array([[score for _, score in image.steps] for image in judged])
        return scores, np.array([image.departures for image in judged])

    def bounded(settings: Settings, scores_NS: np.ndarray) -> Settings:
        delta = float(np.quantile(scores_NS.max(axis=1), 0.95))
        return settings.model_copy(update={"delta": delta, "score_fall": largest_fall(scores_NS)})

    best: tuple[float, int] | None = None
    for start_step in start_steps or (FAST_STEPS if profile == "fast" else START_STEPS):
        settings = candidate(start_step)
        if profile == "exact":
            settings = bounded(settings, walk(settings, few, few_kinds)[0])
        tried = replace(model, settings=settings)
        goods = _judge(tried, few, few_kinds, batch_size, seed, on_image)
        bads = _judge(tried, anomalous, few_kinds, batch_size, seed, on_image)
        quality = _separation(tried, goods, bads, masks)
        if best is None or quality > best[0]:
            best = (quality, start_step)
    assert best is not None
    settings = candidate(best[1])
    if profile == "fast":
        return settings
    of_good = walk(settings, good, kinds)
    of_bad = walk(settings, _synthetic(good, foreground_mode, seed)[0], kinds)
    guess = fit_guess(*(np.concatenate(both) for both in zip(of_good, of_bad, strict=True)))
    return bounded(settings, of_good[0]).model_copy(update={"score_guess": guess})


def calibrate(
    model: Model,
    good: Sequence[np.ndarray],
    *,
    categories: Sequence[str] | None = None,
    profile: Profile = "exact",
    start_steps: Sequence[int] | None = None,
    foreground_mode: ForegroundMode = 3,
    target_fpr: float = 0.05,
    batch_size: int = 8,
    seed: int = 0,
    on_image: Callable[[int], None] = lambda done: None,
) -> Settings:
    """`choose_steps`, and the threshold from the same images.

    The threshold is the conformal quantile of the good scores: a new good image exceeds it with probability at most
    ``target_fpr``, provided there are at least `images_needed` good images (with fewer, the largest good score is
    used). With several categories each gets one of its own.
    """
    settings = choose_steps(
        model,
        good,
        categories=categories,
        profile=profile,
        start_steps=start_steps,
        foreground_mode=foreground_mode,
        batch_size=batch_size,
        seed=seed,
        on_image=on_image,
    )
    kinds = list(categories) if categories is not None else [model.category] * len(good)
    judged = _judge(replace(model, settings=settings), good, kinds, batch_size, seed, on_image)
    scores = np.array([image.score for image in judged])
    thresholds: dict[str, Any] = {"threshold": conformal_quantile(scores, target_fpr)}
    if model.prompts:
        of = np.array(kinds)
        thresholds["thresholds"] = {k: conformal_quantile(scores[of == k], target_fpr) for k in sorted(set(kinds))}
    return settings.model_copy(update=thresholds)


@dataclass(frozen=True)
class Comparison:
    """Image AUROC of two models on the same good images and synthetic anomalies.

    ``low`` is the lower end of the 95 % bootstrap interval of (new - old).
    """

    new: float
    old: float
    low: float
    margin: float

    @property
    def passed(self) -> bool:
        """No worse than the old one beyond the margin."""
        return self.low >= -self.margin

    def describe(self) -> str:
        change = self.new - self.old
        return f"AUROC {self.new:.3f} against {self.old:.3f}, {change:+.3f} (at worst {self.low:+.3f})"


def compare(
    new: Model,
    old: Model,
    good_new: Sequence[np.ndarray],
    good_old: Sequence[np.ndarray],
    foreground_mode: ForegroundMode,
    margin: float,
    seed: int = 1,
    resamples: int = 1000,
) -> Comparison:
    """Whether ``new`` detects no worse than ``old``, as far as good images can tell.

    Args:
        good_new, good_old: the same held-out good images at either model's resolution, uint8 [R, R, 3] each.
        seed: of the anomalies; not the one `calibrate` chose T with.
    """
    scores = []
    for model, good in ((new, good_new), (old, good_old)):
        anomalous, _ = _synthetic(good, foreground_mode, seed)
        kinds = [model.category] * (2 * len(good))
        judged = _judge(model, [*good, *anomalous], kinds, 8, seed, lambda done: None)
        scores.append(np.array([image.score for image in judged]))
    size = len(good_new)
    rng = np.random.default_rng(seed)
    drawn = [half * size + rng.integers(0, size, (resamples, size)) for half in (0, 1)]
    new_resampled, old_resampled = (auroc_of_resamples(of, *drawn) for of in scores)
    everything = np.arange(2 * size).reshape(2, 1, size)
    auroc_new, auroc_old = (float(auroc_of_resamples(of, *everything)[0]) for of in scores)
    return Comparison(auroc_new, auroc_old, float(np.quantile(new_resampled - old_resampled, 0.025)), margin)


def judged_images(good: int, profile: Profile = "exact") -> int:
    """How many images `calibrate` judges, for a progress bar."""
    few = min(good, SELECTION_IMAGES)
    return 2 * few * len(FAST_STEPS) + good if profile == "fast" else 3 * few * len(START_STEPS) + 3 * good


def images_needed(target_fpr: float) -> int:
    """How many good images the conformal quantile needs to keep a false-positive rate: ⌈1/α⌉ - 1."""
    return math.ceil(1 / target_fpr - 1e-9) - 1


def conformal_quantile(scores: Sequence[float] | np.ndarray, target_fpr: float) -> float:
    """The ⌈(n + 1)(1 - α)⌉-th smallest score (split conformal prediction); the largest when n is too small for α."""
    rank = math.ceil((len(scores) + 1) * (1 - target_fpr))
    return float(np.sort(np.asarray(scores, dtype=np.float64))[min(rank, len(scores)) - 1])


def _synthetic(
    good: Sequence[np.ndarray], foreground_mode: ForegroundMode, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Each good image with a synthetic anomaly, and the masks [n, R, R]."""
    foreground_BHW = foreground(to_tensor(good), foreground_mode) if foreground_mode != 3 else None
    seeds = [seed * 1_000_003 + index for index in range(len(good))]
    anomalous, masks = synthesis.synthesize(
        torch.from_numpy(np.stack(good)), seeds=seeds, foreground_BHW=foreground_BHW, probability=1.0
    )
    return list(anomalous.numpy()), masks.numpy()


def _judge(
    model: Model,
    images: Sequence[np.ndarray],
    kinds: Sequence[str],
    batch_size: int,
    seed: int,
    on_image: Callable[[int], None],
) -> list[Detection]:
    judged: dict[str, Detection] = {}
    requests = [Request(str(index), image, kinds[index]) for index, image in enumerate(images)]
    for request, verdict in run(Engine(model, batch_size, seed), requests):
        if isinstance(verdict, Exception):
            raise verdict
        judged[request.image_id] = verdict
        on_image(1)
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
        return image_metrics(scores, labels)["AUROC"]
    pixels = PixelCounts()
    for anomaly_map, mask in zip(maps.numpy(), truth, strict=True):
        pixels.add(anomaly_map, mask)
    return image_metrics(scores, labels)["AUROC"] + pixels.metrics()["P-AP"]


def map_at_full_size(model: Model, image: Detection) -> Tensor:
    """The map the score was taken from, float32 [D, D]."""
    kept = torch.from_numpy(image.anomaly_map).float()
    return full_size_map(kept[None], model.settings)[0] if kept.shape[0] != model.settings.feature_resolution else kept
