"""The denoising steps T, S, min_step and δ, from good images and synthetic anomalies alone.

The released code chose these by hand on the test set; here the test set is never used.

Shapes: N images, S steps, R the bundle's resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from glad_core.bundle.model import Model
from glad_core.bundle.settings import Profile, Settings
from glad_core.engine.chain import Chain
from glad_core.engine.search import fit_guess, largest_fall
from glad_core.foreground import ForegroundMode
from glad_core.image_metrics import image_metrics
from glad_core.judge import map_at_full_size
from glad_core.pictures import judge_all, with_anomalies
from glad_core.pixel_metrics import PixelCounts
from glad_core.verdict import Detection
from glad_core.views import Frames

# The published settings walk 30 timesteps at a time (T = 750, S = 25) and stop searching at 350 / 750 of T. Most images
# never stop before and are rebuilt from there, too low for many defects to go: two thirds tell more of them apart.
STRIDE = 30
MIN_STEP_SHARE = 2 / 3
START_STEPS = (250, 500, 750)  # the candidates for T: between more of them so few images decide by chance
FAST_STEPS = (100, 200, 300)  # and for the only step of profile `fast`
SELECTION_IMAGES = 16  # T is chosen on this many good images; δ and the threshold then use all
UNREACHABLE_DELTA = 1e4


class Label(NamedTuple):
    """Category and name of an image to calibrate on."""

    category: str
    name: str


@dataclass(frozen=True)
class StepCalibrator:
    """Chooses the steps of a model from good images that were not used in training.

    Args:
        model: the bundle; settings that are not chosen stay as they are.
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
        picked = evenly(len(good), SELECTION_IMAGES)
        few, few_labels = [good[index] for index in picked], [labels[index] for index in picked]
        settings, walked = self._with_best_start(few, few_labels)
        if self.profile == "fast":
            return settings
        others = sorted(set(range(len(good))) - set(picked))
        walked = walked + self._walk(settings, [good[index] for index in others], [labels[index] for index in others])
        anomalous, _ = with_anomalies(few, self.foreground_mode, self.seed)
        both = walked + self._walk(settings, anomalous, few_labels)
        guess = fit_guess(_step_scores(both), np.array([detection.departures for detection in both]))
        return _with_delta(settings, _step_scores(walked)).model_copy(update={"score_guess": guess})

    def _with_best_start(self, good: Sequence[np.ndarray], labels: Sequence[Label]) -> tuple[Settings, list[Detection]]:
        """Settings with the candidate T that best separates good images from the same images with anomalies.

        And the verdicts on the good images with it, compared at every step.
        """
        anomalous, masks = with_anomalies(good, self.foreground_mode, self.seed)
        quality: dict[int, float] = {}
        verdicts: dict[int, list[Detection]] = {}
        for start_step in self.start_steps or (FAST_STEPS if self.profile == "fast" else START_STEPS):
            settings = self._with_start(start_step)
            if self.profile == "exact":
                walked = verdicts[start_step] = self._walk(settings, good, labels)
                settings = _with_delta(settings, _step_scores(walked))
                judged_good = self._stopped(settings, walked, good, labels)
            else:
                judged_good = verdicts[start_step] = self._judge(settings, good, labels)
            judged_anomalous = self._judge(settings, anomalous, labels)
            quality[start_step] = _separation(settings, judged_good, judged_anomalous, masks)
        best = max(quality, key=quality.__getitem__)
        return self._with_start(best), verdicts[best]

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
        categories, names = [label.category for label in labels], [label.name for label in labels]
        return judge_all(model, images, categories, names, self.batch_size, self.seed, self.on_image)

    def _labels(
        self, images: Sequence[np.ndarray | Frames], categories: Sequence[str] | None, names: Sequence[str] | None
    ) -> list[Label]:
        """The label of every image; the model's category and a number where none is given."""
        categories = categories or [self.model.category] * len(images)
        return list(map(Label, categories, names or map("image {}".format, range(len(images)))))


def judged_for_steps(tiles: int, profile: Profile) -> int:
    """At most how many images `StepCalibrator.choose_steps` judges that gets so many."""
    few = min(tiles, SELECTION_IMAGES)
    return 2 * few * len(FAST_STEPS) if profile == "fast" else 3 * few * len(START_STEPS) + tiles


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, evenly spread."""
    return [round(index) for index in np.linspace(0, count - 1, min(count, most))]


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
