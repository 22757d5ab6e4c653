"""The start step T, δ and the decision threshold, from good images and synthetic anomalies alone.

The released code chose these by hand on the test set; here the test set is never used.

Shapes: N images, S steps, R the bundle's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from glad_core.bundle.good_scores import kept
from glad_core.bundle.memory import PatchMemory
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Method, Profile, Settings
from glad_core.engine.chain import Chain
from glad_core.engine.search import fit_guess, largest_fall
from glad_core.foreground import ForegroundMode
from glad_core.image_metrics import image_metrics
from glad_core.judge import map_at_full_size
from glad_core.pictures import (
    all_framings,
    anomalous_pictures,
    as_pictures,
    judge_all,
    score_pictures,
    seen_by,
    tiles_of,
    with_anomalies,
)
from glad_core.pixel_metrics import PixelCounts
from glad_core.stitch import combined_score, standards
from glad_core.threshold import conformal_quantile
from glad_core.verdict import Detection
from glad_core.views import Frames, Framing

# The published settings walk 30 timesteps at a time (T = 750, S = 25) and stop searching at 350 / 750 of T.
STRIDE = 30
MIN_STEP_SHARE = 350 / 750
START_STEPS = (250, 500, 750)  # the candidates for T: between more of them so few images decide by chance
FAST_STEPS = (100, 200, 300)  # and for the only step of profile `fast`
STEP_TILES = 40  # the steps are chosen on so many tiles, or one for each picture
TEST_TILES = 200  # methods and views are compared on about as many, good ones
NEAREST_TILES = 600  # and those of the nearest good patches, which cost a tenth
SELECTION_IMAGES = 16  # T is chosen on this many good images; δ and the threshold then use all
UNREACHABLE_DELTA = 1e4
# AUROC by which a single view must be better than all of them. Synthetic anomalies are small and say little of what is
# only seen on the whole picture; a view left out is a kind of defect that nobody sees.
VIEWS_MARGIN = 0.02
# And by which a way that denoises must be better than the nearest good patches, which take a tenth of the time: between
# 16 good pictures and 16 with anomalies an AUROC of .77 varies by .08 from chance alone.
METHODS_MARGIN = 0.05
ADAPTIVE, NEAREST = "adaptive steps", "nearest good patches"


class Label(NamedTuple):
    """Category and name of an image to calibrate on."""

    category: str
    name: str


class Quality(NamedTuple):
    """How well good pictures and the same with synthetic anomalies are told apart.

    Image AUROC, and for those that are equal the distance of the two means in standard deviations.
    """

    auroc: float
    distance: float


class Found(NamedTuple):
    """The indices of a method's best views, how well it separates through them, and its settings with them."""

    views: list[int]
    quality: Quality
    settings: Settings


class Choice(NamedTuple):
    """What calibration chose: settings, the good pictures' scores [N], the indices of the views kept.

    ``good_scores`` are those scores as a bundle keeps them beside its thresholds; empty without a threshold.
    ``name`` is the method in words, ``qualities`` those of all methods that were compared, ``compared`` the settings
    that each was compared with, if there are several: no thresholds.
    """

    settings: Settings
    scores: np.ndarray
    views: list[int]
    name: str
    qualities: dict[str, Quality]
    compared: dict[str, Settings]
    good_scores: dict[str, list[float]]


@dataclass(frozen=True)
class Calibrator:
    """Chooses settings of a model from good images that were not used in training.

    Args:
        model: the bundle; settings that are not chosen here stay as they are.
        profile: of the new settings.
        foreground_mode: where on an image synthetic anomalies may lie.
        start_steps: the candidates for T; None: `START_STEPS`, or `FAST_STEPS` for profile `fast`.
        batch_size: images in flight.
        seed: of the noise and the anomalies.
        on_image: called with 1 after every image judged.
    """

    model: Model
    profile: Profile = "exact"
    foreground_mode: ForegroundMode = 3
    start_steps: Sequence[int] | None = None
    batch_size: int = 8
    seed: int = 0
    on_image: Callable[[int], None] = lambda count: None

    def choose_steps(
        self, good: Sequence[np.ndarray], categories: Sequence[str] | None = None, names: Sequence[str] | None = None
    ) -> Settings:
        """The model's settings with T, S, min_step and δ chosen for these good images; the threshold stays.

        δ is the 95 % quantile, over good images, of the largest step score that they reach before min_step, so few good
        images exceed it. The largest fall of a step score along the chain becomes the bound of the guarded search; its
        guess of where δ was exceeded is fitted to the good images and to some of them with anomalies (`search`).
        Profile `fast` has no steps to compare: only T is chosen.

        Args:
            good: uint8 [R, R, 3] each.
            categories: of the images, if the bundle is for several.
            names: of the images, for messages.

        Raises:
            NotFinite: the model gives an image no finite score.
        """
        labels = self._labels(good, categories, names)
        # Evenly spread, so that every category takes part.
        picked = _evenly(len(good), SELECTION_IMAGES)
        few, few_labels = [good[index] for index in picked], [labels[index] for index in picked]
        settings = self._with_best_start(few, few_labels)
        if self.profile == "fast":
            return settings
        walked = self._walk(settings, good, labels)
        anomalous, _ = with_anomalies(few, self.foreground_mode, self.seed)
        both = walked + self._walk(settings, anomalous, few_labels)
        guess = fit_guess(_step_scores(both), np.array([detection.departures for detection in both]))
        return _with_delta(settings, _step_scores(walked)).model_copy(update={"score_guess": guess})

    def choose(
        self,
        good: Sequence[np.ndarray | Frames],
        categories: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        memory: Sequence[PatchMemory] = (),
    ) -> Choice:
        """The method, its steps and its views that separate best: `choose_steps` on tiles, and the alternatives to it.

        Of several views all are kept, each standardised by the good pictures, unless a single one tells good pictures
        from the same with synthetic anomalies clearly better. With a ``memory`` the adaptive steps are compared with as
        many fixed ones, with a single one and with the nearest good patches, each through its best views. The patches
        are chosen unless one of the others is clearly better.

        Args:
            good: arrays [R, R, 3], or pictures with a frame for each of `compared_framings`.
            memory: good patches of every view, of pictures other than ``good``.

        Raises:
            NotFinite: as `choose_steps`.
        """
        labels, pictures = self._labels(good, categories, names), as_pictures(good)
        steps = replace(self, model=_of_method(self.model, "glad"))
        glad = steps.model.settings
        framings = compared_framings(glad, methods=bool(memory))
        tiles, tile_labels = _some_tiles(seen_by(glad, framings, pictures), labels, glad)
        adaptive = steps.choose_steps(tiles, *map(list, zip(*tile_labels, strict=True)))
        methods = {ADAPTIVE: adaptive}
        if memory:
            methods["fixed steps"] = adaptive.model_copy(update={"delta": 0.0, "score_fall": None, "score_guess": None})
            single = replace(steps, profile="fast")
            methods["a single step"] = single.choose_steps(tiles, *map(list, zip(*tile_labels, strict=True)))
            methods[NEAREST] = adaptive.judged_by("nearest")
        remembering = replace(self, model=replace(self.model, memory=memory))
        if len(methods) > 1 or len(adaptive.views) > 1:
            found = remembering._compare(methods, framings, pictures, labels)
        else:
            found = {ADAPTIVE: Found([0], Quality(0.0, 0.0), adaptive)}
        best = max(found, key=lambda name: found[name].quality)
        if NEAREST in found and found[NEAREST].quality.auroc >= found[best].quality.auroc - METHODS_MARGIN:
            best = NEAREST
        views = found[best].views
        scores_NV = remembering._score(methods[best], seen_by(methods[best], framings, pictures), labels)[:, views]
        settings = _of_views(methods[best], views, scores_NV)
        qualities = {name: found[name].quality for name in methods}
        compared = {name: found[name].settings for name in methods}
        return Choice(settings, combined_scores(settings, scores_NV), views, best, qualities, compared, {})

    def calibrate(
        self,
        good: Sequence[np.ndarray | Frames],
        categories: Sequence[str] | None = None,
        target_fpr: float = 0.05,
        names: Sequence[str] | None = None,
        memory: Sequence[PatchMemory] = (),
    ) -> Choice:
        """`choose`, and the threshold from the same pictures.

        The threshold is the conformal quantile of the good pictures' scores: a new good picture exceeds it with
        probability at most ``target_fpr``, if there are at least `images_needed` good pictures (with fewer, the largest
        good score is the threshold). In a bundle for several categories each has its own.

        Raises:
            NotFinite: as `choose_steps`.
        """
        choice = self.choose(good, categories, names, memory)
        kinds = np.array([label.category for label in self._labels(good, categories, names)])
        thresholds: dict[str, Any] = {"threshold": conformal_quantile(choice.scores, target_fpr)}
        scores = {"": choice.scores}
        if self.model.prompts:
            scores = {kind: choice.scores[kinds == kind] for kind in sorted(set(kinds.tolist()))}
            thresholds["thresholds"] = {kind: conformal_quantile(own, target_fpr) for kind, own in scores.items()}
        return choice._replace(
            settings=choice.settings.model_copy(update=thresholds),
            good_scores={kind: kept(own.tolist(), len(scores)) for kind, own in scores.items()},
        )

    def _compare(
        self,
        methods: dict[str, Settings],
        framings: Sequence[Framing],
        pictures: Sequence[Frames],
        labels: Sequence[Label],
    ) -> dict[str, Found]:
        """How well each method separates. One behind the nearest good patches on half of its pictures gets no more."""
        found: dict[str, Found] = {}
        for name, settings in reversed(methods.items()):
            picked = _tested(pictures, settings)
            if name != NEAREST and _halved(picked, methods):
                found[name] = self._best_views(settings, framings, pictures, labels, picked[::2])
                if found[name].quality.auroc <= found[NEAREST].quality.auroc:
                    self.on_image(2 * sum(_count(settings, pictures[index]) for index in picked))
                    continue
            found[name] = self._best_views(settings, framings, pictures, labels, picked)
        return found

    def _best_views(
        self,
        settings: Settings,
        framings: Sequence[Framing],
        pictures: Sequence[Frames],
        labels: Sequence[Label],
        picked: Sequence[int],
    ) -> Found:
        """All views, or the one that separates clearly better, on the picked good pictures."""
        labels = [labels[index] for index in picked]
        some_pictures = [pictures[index] for index in picked]
        good, anomalous = (
            seen_by(settings, framings, each)
            for each in anomalous_pictures(
                some_pictures, framings, settings.resolution, self.foreground_mode, self.seed
            )
        )
        # Side by side, so that what is equal in both is judged once.
        both = list(chain.from_iterable(zip(good, anomalous, strict=True)))
        scores_NV = self._score(settings, both, [label for label in labels for _ in range(2)])
        scores_NV = np.concatenate([scores_NV[::2], scores_NV[1::2]])
        truth = np.array([0] * len(good) + [1] * len(anomalous))
        views = list(range(len(settings.views)))
        candidates = [*([view] for view in views), views] if len(views) > 1 else [views]
        qualities = [
            _quality(
                combined_scores(_of_views(settings, some, scores_NV[: len(good), some]), scores_NV[:, some]), truth
            )
            for some in candidates
        ]
        best = qualities.index(max(qualities))
        if qualities[-1].auroc >= qualities[best].auroc - VIEWS_MARGIN:
            best = len(candidates) - 1
        some = candidates[best]
        return Found(some, qualities[best], _of_views(settings, some, scores_NV[: len(good), some]))

    def _score(self, settings: Settings, pictures: Sequence[Frames], labels: Sequence[Label]) -> np.ndarray:
        categories, names = zip(*labels, strict=True)
        model = replace(self.model, settings=settings)
        return score_pictures(model, pictures, categories, names, self.batch_size, self.seed, self.on_image)

    def _with_best_start(self, good: Sequence[np.ndarray], labels: Sequence[Label]) -> Settings:
        """Settings with the candidate T that best separates good images from the same images with anomalies."""
        anomalous, masks = with_anomalies(good, self.foreground_mode, self.seed)
        quality: dict[int, float] = {}
        for start_step in self.start_steps or (FAST_STEPS if self.profile == "fast" else START_STEPS):
            settings = self._with_start(start_step)
            if self.profile == "exact":
                walked = self._walk(settings, good, labels)
                settings = _with_delta(settings, _step_scores(walked))
                judged_good = self._stopped(settings, walked, good, labels)
            else:
                judged_good = self._judge(settings, good, labels)
            judged_anomalous = self._judge(settings, anomalous, labels)
            quality[start_step] = _separation(settings, judged_good, judged_anomalous, masks)
        return self._with_start(max(quality, key=quality.__getitem__))

    def _with_start(self, start_step: int) -> Settings:
        """The model's settings with this T, and the S and min_step that belong to it; δ is not yet chosen."""
        values = self.model.settings.model_dump() | {"profile": self.profile, "start_step": start_step}
        values |= {"score_fall": None, "score_guess": None}
        if self.profile == "fast":
            return Settings(**values | {"inference_steps": 1, "min_step": 0, "delta": 0.0})
        values |= {
            "inference_steps": max(1, round(start_step / STRIDE)),
            "min_step": round(start_step * MIN_STEP_SHARE),
        }
        return Settings(**values)

    def _walk(self, settings: Settings, images: Sequence[np.ndarray], labels: Sequence[Label]) -> list[Detection]:
        """Verdicts on images that are compared at every step down to min_step, and never stop before it."""
        unstopped = settings.model_copy(update={"delta": UNREACHABLE_DELTA, "score_fall": None, "score_guess": None})
        return self._judge(unstopped, images, labels)

    def _stopped(
        self, settings: Settings, walked: list[Detection], images: Sequence[np.ndarray], labels: Sequence[Label]
    ) -> list[Detection]:
        """The verdicts with δ. Images that never exceed it walk as they did: only the others are judged again."""
        delta = Chain.of(settings, len(self.model.alphas)).delta
        above = [index for index, most in enumerate(_step_scores(walked).max(axis=1)) if most > delta]
        self.on_image(len(images) - len(above))
        if not above:
            return walked
        again = self._judge(settings, [images[index] for index in above], [labels[index] for index in above])
        verdicts = dict(enumerate(walked)) | dict(zip(above, again, strict=True))
        return list(verdicts.values())

    def _judge(self, settings: Settings, images: Sequence[np.ndarray], labels: Sequence[Label]) -> list[Detection]:
        model = replace(self.model, settings=settings)
        categories, names = zip(*labels, strict=True)
        return judge_all(model, images, categories, names, self.batch_size, self.seed, self.on_image)

    def _labels(
        self, images: Sequence[np.ndarray | Frames], categories: Sequence[str] | None, names: Sequence[str] | None
    ) -> list[Label]:
        """The label of every image; the model's category and a number where none is given."""
        categories = categories or [self.model.category] * len(images)
        return list(map(Label, categories, names or map("image {}".format, range(len(images)))))


def compared_framings(settings: Settings, methods: bool) -> tuple[Framing, ...]:
    """How pictures are framed that `Calibrator.choose` is to compare ``methods`` on, or GLAD's views alone."""
    kinds: tuple[Method, ...] = ("glad", "nearest") if methods else ("glad",)
    return all_framings(*map(settings.judged_by, kinds))


def judged_images(
    good: Sequence[np.ndarray | Frames],
    settings: Settings,
    profile: Profile = "exact",
    steps_only: bool = False,
    methods: bool = False,
) -> int:
    """At most how many tiles `Calibrator.calibrate` judges, or `Calibrator.choose_steps` images, for a progress bar.

    ``methods``: the alternatives are compared too.
    """
    pictures = as_pictures(good)
    glad, nearest = settings.judged_by("glad"), settings.judged_by("nearest")
    counts, cheap_counts = ([_count(each, picture) for picture in pictures] for each in (glad, nearest))
    tiles = min(sum(counts), max(len(counts), STEP_TILES))
    few = min(tiles, SELECTION_IMAGES)
    single = 2 * few * len(FAST_STEPS)
    steps = single if profile == "fast" else 3 * few * len(START_STEPS) + tiles + few
    if steps_only:
        return steps
    tested = _tested(pictures, glad)
    tests = 2 * sum(counts[index] for index in tested)
    cheap = 2 * sum(cheap_counts[index] for index in _tested(pictures, nearest))
    if methods:
        if _halved(tested, [NEAREST]):
            tests += 2 * sum(counts[index] for index in tested[::2])
        return steps + single + 3 * tests + cheap + max(sum(counts), sum(cheap_counts))
    return steps + sum(counts) + (tests if len(settings.views) > 1 else 0)


def _tested(pictures: Sequence[Frames], settings: Settings) -> list[int]:
    """Indices of the pictures that a method and its views are tested on: as many as have so many tiles, a few at least.

    Fewer would often prefer one view to another by chance.
    """
    tiles = sum(_count(settings, picture) for picture in pictures)
    most = NEAREST_TILES if settings.method == "nearest" else TEST_TILES
    return _evenly(len(pictures), max(SELECTION_IMAGES, most * len(pictures) // tiles))


def _halved(picked: Sequence[int], methods: Container[str]) -> bool:
    """Whether half of the picked pictures are enough to see that a method is behind the nearest good patches."""
    return NEAREST in methods and len(picked) >= SELECTION_IMAGES


def _count(settings: Settings, picture: Frames) -> int:
    """Tiles of a picture in all views."""
    return sum(len(framing.places(*picture.size)) for framing in settings.framings())


def _evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, evenly spread."""
    return [round(index) for index in np.linspace(0, count - 1, min(count, most))]


def _some_tiles(
    pictures: Sequence[Frames], labels: Sequence[Label], settings: Settings
) -> tuple[list[np.ndarray], list[Label]]:
    """Tiles of all views, `STEP_TILES` or as many as pictures, evenly spread, and their labels."""
    tiles = [
        (tile, label) for picture, label in zip(tiles_of(pictures, settings), labels, strict=True) for tile in picture
    ]
    chosen = [tiles[index] for index in _evenly(len(tiles), max(len(pictures), STEP_TILES))]
    return [tile for tile, _ in chosen], [label for _, label in chosen]


def _of_method(model: Model, method: Method) -> Model:
    return replace(model, settings=model.settings.judged_by(method))


def _of_views(settings: Settings, chosen: Sequence[int], scores_NV: np.ndarray) -> Settings:
    """Settings with these views alone, standardised by good pictures' scores [N, V] in them."""
    views = [
        settings.views[view].model_copy(update={"good_mean": mean, "good_spread": spread})
        for view, (mean, spread) in zip(chosen, standards(scores_NV), strict=True)
    ]
    return settings.model_copy(update={"views": tuple(views)})


def combined_scores(settings: Settings, scores_NV: np.ndarray) -> np.ndarray:
    """`combined_score` of every picture [N]."""
    return np.array([combined_score(settings, row) for row in scores_NV.tolist()])


def _quality(scores: np.ndarray, truth: np.ndarray) -> Quality:
    good, anomalous = scores[truth == 0], scores[truth == 1]
    spread = math.sqrt((good.var() + anomalous.var()) / 2) or 1.0
    return Quality(image_metrics(scores, truth)["AUROC"], float(anomalous.mean() - good.mean()) / spread)


def _step_scores(walked: Sequence[Detection]) -> np.ndarray:
    """Step scores [N, S] of images that were compared at every step."""
    return np.array([[score for _, score in detection.steps] for detection in walked])


def _with_delta(settings: Settings, scores_NS: np.ndarray) -> Settings:
    delta = float(np.quantile(scores_NS.max(axis=1), 0.95))
    return settings.model_copy(update={"delta": delta, "score_fall": largest_fall(scores_NS)})


def _separation(settings: Settings, good: list[Detection], anomalous: list[Detection], masks_NRR: np.ndarray) -> float:
    """Image AUROC plus pixel AP of synthetic anomalies among good images; without a mask the AUROC alone."""
    scores = np.array([detection.score for detection in good + anomalous])
    labels = np.array([0] * len(good) + [1] * len(anomalous))
    auroc = image_metrics(scores, labels)["AUROC"]
    maps = torch.stack([map_at_full_size(settings, detection) for detection in anomalous])
    masks = torch.from_numpy(masks_NRR)[:, None].float()
    masks = torch.nn.functional.interpolate(masks, size=maps.shape[-2:], mode="nearest")[:, 0]
    if not masks.any():
        return auroc
    pixels = PixelCounts()
    for anomaly_map, mask in zip(maps.numpy(), masks.numpy(), strict=True):
        pixels.add(anomaly_map, mask)
    return auroc + pixels.metrics()["P-AP"]
