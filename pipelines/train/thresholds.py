"""Decision thresholds from the scores of a finished run over good images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.dataset as pads

from glad_core.bundle.glad_json import Description, with_settings
from glad_core.bundle.good_scores import kept
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from glad_core.threshold import confident_threshold, conformal_quantile, far_more, images_needed
from pipelines.runs.feedback import require_marks
from pipelines.runs.query import DECIDED
from pipelines.runs.run import Run


@dataclass(frozen=True)
class Scores:
    """Scores of a run's good images and of its confirmed anomalies, and the ids of the models that gave them.

    Scores are in pairs with their image's category.
    """

    good: list[tuple[float, str]]
    anomalous: list[tuple[float, str]]
    model_ids: set[str]

    def by_category(self, category: str) -> dict[str, list[float]]:
        """The good scores of each category that a bundle for ``category`` knows; under "" all, if that is one."""
        if "," not in category:
            return {"": [score for score, _ in self.good]}
        return {name: [score for score, kind in self.good if kind == name] for name in category.split(",")}


def with_thresholds(
    description: Description, settings: Settings, scores: Scores, target_fpr: float, confidence: float | None
) -> Description:
    """The bundle with these settings and the thresholds of the scores, one for each of several categories.

    Raises:
        GladError: too few scores.
    """
    good = scores.by_category(description.category)
    thresholds = {name: _threshold(own, target_fpr, confidence, name) for name, own in good.items()}
    provenance: dict[str, Any] = {"target_fpr": target_fpr, "calibration_images": len(scores.good)}
    provenance["good_scores"] = {name: kept(own, len(good)) for name, own in good.items()}
    if confidence is not None:
        provenance["confidence"] = confidence
    whole = _threshold([score for score, _ in scores.good], target_fpr, confidence)
    chosen = {"threshold": whole, "thresholds": {} if "" in thresholds else thresholds}
    return with_settings(description, settings.model_copy(update=chosen), provenance)


def read_scores(run: Run, with_feedback: bool) -> Scores:
    """The scores of a finished run.

    With feedback, every image that nobody confirmed as anomalous is good, so all alarms must be marked: taking the
    marked ones alone would leave out the good images that score highest, or count defects as good.

    Raises:
        GladError: images have no finite score, or alarms are not marked.
    """
    _check_finite(run)
    table = run.results().to_table(columns=["score", "category", "model_id", "image_id", "is_anomalous"])
    model_ids, rows = set(table["model_id"].to_pylist()), table.to_pylist()
    if not with_feedback:
        return Scores([(row["score"], row["category"]) for row in rows], [], model_ids)
    verdicts = {mark["image_id"]: mark["verdict"] for mark in require_marks(run)}
    alarms = [row["image_id"] for row in rows if row["is_anomalous"]]
    unmarked = sum(image_id not in verdicts for image_id in alarms)
    if unmarked:
        raise GladError(
            f"{run.location}: {unmarked} of {len(alarms)} alarms are not marked yet; "
            f"mark them with `glad view {run.location}`"
        )
    parts: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    for row in rows:
        parts[verdicts.get(row["image_id"]) == "confirmed"].append((row["score"], row["category"]))
    return Scores(parts[False], parts[True], model_ids)


def _threshold(scores: list[float], target_fpr: float, confidence: float | None, category: str = "") -> float:
    """The score that a new good image exceeds with probability at most ``target_fpr``.

    Raises:
        GladError: too few scores.
    """
    needed, count = images_needed(target_fpr, confidence), len(scores)
    if count < needed:
        least = 1 / (count + 1) if confidence is None else 1 - (1 - confidence) ** (1 / max(count, 1))
        sure = "" if confidence is None else f" with confidence {confidence:g}"
        rate = f"{target_fpr:g}{sure}"
        raise GladError(
            f"{count} good images{_of(category)}: a false-positive rate of {rate} needs at least {needed}; "
            f"give more images or a --target-fpr of at least {least:.3g}"
        )
    if confidence is None:
        return conformal_quantile(scores, target_fpr)
    return confident_threshold(scores, target_fpr, confidence)


def check_good(scores: list[float], threshold: float | None, target_fpr: float, category: str = "") -> None:
    """Refuse a run over images that cannot all be good ones like those behind the present ``threshold``.

    Raises:
        GladError: far more scores exceed it than its target false-positive rate allows.
    """
    if threshold is None:
        return
    exceeding = sum(score > threshold for score in scores)
    if far_more(exceeding, len(scores), target_fpr):
        raise GladError(
            f"{exceeding} of {len(scores)} images{_of(category)} exceed the present threshold {threshold:.4g}, which "
            f"allows {target_fpr:.1%} of good ones: are there defects among them, or has the camera changed? Look at "
            "them with `glad view`; --anyway calibrates on them all"
        )


def _check_finite(run: Run) -> None:
    """Refuse a run in which images have no finite score: left out, they would make the threshold too low."""
    undecided = run.results().to_table(columns=["uri"], filter=~DECIDED)["uri"].to_pylist()
    undecided += (
        run.errors().to_table(columns=["uri"], filter=pads.field("error_type") == "not_finite")["uri"].to_pylist()
    )
    if undecided:
        raise GladError(
            f"{len(undecided)} images have no finite score, such as {undecided[0]}: "
            "leave them out, or train the bundle again"
        )


def _of(category: str) -> str:
    return f" of '{category}'" if category else ""
