"""Method, views and decision threshold beside the denoising steps, from good images and synthetic anomalies alone.

Shapes: N images, V views, R the bundle's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from glad_core.bundle.good_scores import kept
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Method, Profile, Settings
from glad_core.calibrated_steps import SELECTION_IMAGES, Label, StepCalibrator, evenly, judged_for_steps
from glad_core.good_patches import GoodPatches
from glad_core.image_metrics import image_metrics
from glad_core.pictures import all_framings, anomalous_pictures, as_pictures, score_pictures, seen_by, tiles_of
from glad_core.stitch import combined_score, standards
from glad_core.threshold import conformal_quantile
from glad_core.views import Frames, Framing

STEP_TILES = 40  # the steps are chosen on so many tiles, or one for each picture
TEST_TILES = 200  # methods and views are compared on about as many, good ones
NEAREST_TILES = 600  # and those of the nearest good patches, which cost a tenth
FIRST_TILES = 100  # of the good pictures that show first whether another way can be clearly better
FIRST_PICTURES = 4  # at least
# AUROC by which a single view must be better than all of them. Synthetic anomalies are small and say little of what is
# only seen on the whole picture; a view left out is a kind of defect that nobody sees.
VIEWS_MARGIN = 0.02
# And by which a way that denoises must be better than the nearest good patches, which take a tenth of the time: between
# 16 good pictures and 16 with anomalies an AUROC of .77 varies by .08 from chance alone.
METHODS_MARGIN = 0.05
ADAPTIVE, NEAREST = "adaptive steps", "nearest good patches"


class Quality(NamedTuple):
    """How well good pictures and the same with synthetic anomalies are told apart.

    Image AUROC, and for those that are equal the distance of the two means in standard deviations; the number of good
    pictures.
    """

    auroc: float
    distance: float
    pictures: int


class Found(NamedTuple):
    """The indices of a method's best views, how well it separates through them, and its settings with them."""

    views: list[int]
    quality: Quality
    settings: Settings


class Choice(NamedTuple):
    """What calibration chose: settings, good pictures' scores [N] and their categories, the indices of the views kept.

    ``good_scores`` are those scores as a bundle keeps them beside its thresholds; empty without a threshold.
    ``name`` is the method in words, ``qualities`` those of all methods that were compared, ``compared`` the settings
    that each was compared with, if there are several: no thresholds.
    """

    settings: Settings
    scores: np.ndarray
    categories: Sequence[str]
    views: list[int]
    name: str
    qualities: dict[str, Quality]
    compared: dict[str, Settings]
    good_scores: dict[str, list[float]]


class Calibrator(StepCalibrator):
    """Chooses settings of a model from good pictures that were not used in training."""

    def choose(
        self,
        good: Sequence[np.ndarray | Frames],
        categories: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        patches: GoodPatches | None = None,
    ) -> Choice:
        """The method, its steps and its views that separate best: `choose_steps` on tiles, and the alternatives to it.

        Of several views all are kept, each standardised by the good pictures, unless a single one tells good pictures
        from the same with synthetic anomalies clearly better. With ``patches`` the adaptive steps are compared with as
        many fixed ones, with a single one and with the nearest good patches, each through its best views. The patches
        are chosen unless one of the others is clearly better. The scores are then those of ``patches``, of which there
        are more.

        Args:
            good: arrays [R, R, 3], or pictures with a frame for each of `compared_framings`.
            patches: of every view; none of those remembered are of ``good``.

        Raises:
            NotFinite: as `choose_steps`.
        """
        labels, pictures = self._labels(good, categories, names), as_pictures(good)
        steps = replace(self, model=_of_method(self.model, "glad"))
        glad = steps.model.settings
        framings = compared_framings(glad, methods=patches is not None)
        tiles, tile_labels = _some_tiles(seen_by(glad, framings, pictures), labels, glad)
        adaptive = steps.choose_steps(tiles, *map(list, zip(*tile_labels, strict=True)))
        methods = {ADAPTIVE: adaptive}
        if patches is not None:
            methods["fixed steps"] = adaptive.model_copy(update={"delta": 0.0, "score_fall": None, "score_guess": None})
            single = replace(steps, profile="fast")
            methods["a single step"] = single.choose_steps(tiles, *map(list, zip(*tile_labels, strict=True)))
            methods[NEAREST] = adaptive.judged_by("nearest")
        memory = patches.memory if patches is not None else []
        remembering = replace(self, model=replace(self.model, memory=memory))
        if len(methods) > 1 or len(adaptive.views) > 1:
            found = remembering._compare(methods, framings, pictures, labels)
        else:
            found = {ADAPTIVE: Found([0], Quality(0.0, 0.0, 0), adaptive)}
        best = max(found, key=lambda name: found[name].quality)
        if NEAREST in found and found[NEAREST].quality.auroc >= found[best].quality.auroc - METHODS_MARGIN:
            best = NEAREST
        views = found[best].views
        kinds = [label.category for label in labels]
        if best == NEAREST and patches is not None:
            scores_NV, kinds = patches.scores(self.seed, self.on_image), [picture.group for picture in patches.pictures]
        else:
            scores_NV = remembering._score(methods[best], seen_by(methods[best], framings, pictures), labels)
        scores_NV = scores_NV[:, views]
        settings = _of_views(methods[best], views, scores_NV)
        qualities = {name: found[name].quality for name in methods}
        compared = {name: found[name].settings for name in methods}
        return Choice(settings, combined_scores(settings, scores_NV), kinds, views, best, qualities, compared, {})

    def calibrate(
        self,
        good: Sequence[np.ndarray | Frames],
        categories: Sequence[str] | None = None,
        target_fpr: float = 0.05,
        names: Sequence[str] | None = None,
        patches: GoodPatches | None = None,
    ) -> Choice:
        """`choose`, and the threshold from the same pictures, or those of ``patches`` where good patches judge.

        The threshold is the conformal quantile of the good pictures' scores: a new good picture exceeds it with
        probability at most ``target_fpr``, if there are at least `images_needed` good pictures (with fewer, the largest
        good score is the threshold). In a bundle for several categories each has its own.

        Raises:
            NotFinite: as `choose_steps`.
        """
        choice = self.choose(good, categories, names, patches)
        kinds = np.array(choice.categories)
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
        """How well each method separates.

        One that is not clearly better than the nearest good patches at first, on some of its pictures, is tested no
        further.
        """
        found: dict[str, Found] = {}
        for name, settings in reversed(methods.items()):
            picked = _tested(pictures, settings)
            if name != NEAREST and (first := _first(picked, pictures, settings, methods)):
                found[name] = self._best_views(settings, framings, pictures, labels, first)
                if found[name].quality.auroc <= found[NEAREST].quality.auroc + METHODS_MARGIN:
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


def compared_framings(settings: Settings, methods: bool) -> tuple[Framing, ...]:
    """How pictures are framed that `Calibrator.choose` is to compare ``methods`` on, or GLAD's views alone."""
    kinds: tuple[Method, ...] = ("glad", "nearest") if methods else ("glad",)
    return all_framings(*map(settings.judged_by, kinds))


def judged_images(
    good: Sequence[np.ndarray | Frames],
    settings: Settings,
    profile: Profile = "exact",
    steps_only: bool = False,
    patches: GoodPatches | None = None,
) -> int:
    """At most how many tiles `Calibrator.calibrate` judges, or `Calibrator.choose_steps` images, for a progress bar."""
    pictures = as_pictures(good)
    glad, nearest = settings.judged_by("glad"), settings.judged_by("nearest")
    counts, cheap_counts = ([_count(each, picture) for picture in pictures] for each in (glad, nearest))
    tiles = min(sum(counts), max(len(counts), STEP_TILES))
    steps = judged_for_steps(tiles, profile)
    if steps_only:
        return steps
    tested = _tested(pictures, glad)
    tests = 2 * sum(counts[index] for index in tested)
    cheap = 2 * sum(cheap_counts[index] for index in _tested(pictures, nearest))
    if patches is not None:
        tests += 2 * sum(counts[index] for index in _first(tested, pictures, glad, [NEAREST]))
        return steps + judged_for_steps(tiles, "fast") + 3 * tests + cheap + max(sum(counts), patches.tiles())
    return steps + sum(counts) + (tests if len(settings.views) > 1 else 0)


def _tested(pictures: Sequence[Frames], settings: Settings) -> list[int]:
    """Indices of the pictures that a method and its views are tested on: as many as have so many tiles, a few at least.

    Fewer would often prefer one view to another by chance.
    """
    tiles = sum(_count(settings, picture) for picture in pictures)
    most = NEAREST_TILES if settings.method == "nearest" else TEST_TILES
    return evenly(len(pictures), max(SELECTION_IMAGES, most * len(pictures) // tiles))


def _first(
    picked: Sequence[int], pictures: Sequence[Frames], settings: Settings, methods: Container[str]
) -> Sequence[int]:
    """Those of the picked pictures that a method is tested on first, half at most; none if all are tested at once.

    Tiles of large pictures are many: then only a few pictures. A method that is no better is then tested on all of
    them, for nothing, once in eight times with four pictures first, once in twenty with eight.
    """
    if NEAREST not in methods or len(picked) < SELECTION_IMAGES:
        return []
    tiles = sum(_count(settings, pictures[index]) for index in picked)
    return picked[:: max(2, min(tiles // FIRST_TILES, len(picked) // FIRST_PICTURES))]


def _count(settings: Settings, picture: Frames) -> int:
    """Tiles of a picture in all views."""
    return sum(len(framing.places(*picture.size)) for framing in settings.framings())


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
    return Quality(image_metrics(scores, truth)["AUROC"], float(anomalous.mean() - good.mean()) / spread, len(good))


def _some_tiles(
    pictures: Sequence[Frames], labels: Sequence[Label], settings: Settings
) -> tuple[list[np.ndarray], list[Label]]:
    """Tiles of all views, `STEP_TILES` or as many as pictures, evenly spread, and their labels."""
    tiles = [
        (tile, label) for picture, label in zip(tiles_of(pictures, settings), labels, strict=True) for tile in picture
    ]
    chosen = [tiles[index] for index in evenly(len(tiles), max(len(pictures), STEP_TILES))]
    return [tile for tile, _ in chosen], [label for _, label in chosen]
