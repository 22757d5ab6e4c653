"""Whether one model detects no worse than another, from good images and synthetic anomalies alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from glad_core.bundle.model import Model
from glad_core.foreground import ForegroundMode
from glad_core.image_metrics import RESAMPLES, auroc_of_resamples
from glad_core.pictures import all_framings, anomalous_pictures, as_pictures, score_pictures, seen_by
from glad_core.stitch import combined_score
from glad_core.views import Frames

BATCH_SIZE = 8


@dataclass(frozen=True)
class ModelComparison:
    """Image AUROC of two models on the same good images and synthetic anomalies.

    ``low`` is the lower end of the 95 % bootstrap interval of (new - old).
    """

    new: float
    old: float
    low: float
    margin: float

    @property
    def passed(self) -> bool:
        """Whether the new model is at most ``margin`` worse."""
        return self.low >= -self.margin

    def describe(self) -> str:
        """The comparison as part of a sentence."""
        change = self.new - self.old
        return f"AUROC {self.new:.3f} against {self.old:.3f}, {change:+.3f} (at worst {self.low:+.3f})"


def compare_models(
    new: Model,
    old: Model,
    good: Sequence[np.ndarray | Frames],
    foreground_mode: ForegroundMode,
    margin: float,
    seed: int = 1,
    names: Sequence[str] | None = None,
) -> ModelComparison:
    """Compare two models on held-out good images and the same images with synthetic anomalies.

    Args:
        new, old: the models.
        good: pictures with a frame for each of both models' `all_framings`; uint8 [R, R, 3] if that is one.
        foreground_mode: where on an image anomalies may lie.
        margin: AUROC that the new model may lose.
        seed: of the anomalies; not the seed with which `Calibrator` chose T.
        names: of the good images, for messages.

    Raises:
        NotFinite: a model gives an image no finite score.
    """
    names = names or [f"image {index}" for index in range(len(good))]
    framings = all_framings(new.settings, old.settings)
    side = min(model.settings.resolution for model in (new, old))
    compared = [*chain(*anomalous_pictures(as_pictures(good), framings, side, foreground_mode, seed))]
    scores = []
    for model in (new, old):
        pictures = seen_by(model.settings, framings, compared)
        categories, both = [model.category] * len(pictures), [*names, *names]
        scores_NV = score_pictures(model, pictures, categories, both, BATCH_SIZE, seed)
        scores.append(np.array([combined_score(model.settings, row) for row in scores_NV.tolist()]))
    size = len(good)
    rng = np.random.default_rng(seed)
    resamples = [half * size + rng.integers(0, size, (RESAMPLES, size)) for half in (0, 1)]
    new_aurocs, old_aurocs = (auroc_of_resamples(model_scores, *resamples) for model_scores in scores)
    everything = np.arange(2 * size).reshape(2, 1, size)
    new_auroc, old_auroc = (float(auroc_of_resamples(model_scores, *everything)[0]) for model_scores in scores)
    return ModelComparison(new_auroc, old_auroc, float(np.quantile(new_aurocs - old_aurocs, 0.025)), margin)
