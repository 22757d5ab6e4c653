"""What ground truth adds to a report: hits, misses and false alarms, and ROC and PRO curves by category."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from pipelines.archive.examples import Example
from pipelines.evaluate.tally import Tally, find_example, tally_results
from pipelines.runs.run import Run

POINTS = 200  # of a curve
PRO_LIMIT = 0.3  # largest false-positive rate that counts for PRO
# By whether the image is anomalous, and whether it was called so.
VERDICTS = {(True, True): "hit", (True, False): "miss", (False, True): "false alarm", (False, False): "correct"}


class Truth:
    """The labels of a dataset, found by the URIs of scored images."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples
        self._by_path = {example.path: example for example in examples}

    def verdict(self, uri: str, called_anomalous: bool | None) -> str:
        """hit, miss, false alarm or correct; in a run without threshold (None) the label: anomalous or good.

        Raises:
            GladError: the image is not in the dataset.
        """
        anomalous = find_example(uri, self._by_path).anomalous
        if called_anomalous is None:
            return "anomalous" if anomalous else "good"
        return VERDICTS[anomalous, called_anomalous]


def curves(run: Run, examples: list[Example]) -> list[dict[str, Any]]:
    """Name, metrics and points of the ROC and PRO curves of each category, counted by tasks of the connected Ray."""
    tallies = tally_results(run, examples)
    return [_curves_of(name, tallies[name]) for name in sorted(tallies)]


def _curves_of(name: str, tally: Tally) -> dict[str, Any]:
    metrics = tally.metrics(PRO_LIMIT)
    labels = np.array([label for _, _, label in tally.images])
    roc: tuple[np.ndarray, ...] = (np.empty(0), np.empty(0))
    if labels.any() and not labels.all():
        roc = roc_curve(labels, np.array([score for _, score, _ in tally.images]))[:2]
    rate, overlap = tally.pixels.pro_curve()
    below = int(np.searchsorted(rate, PRO_LIMIT, side="right"))
    return {
        "category": name,
        "metrics": {key: None if np.isnan(value) else round(value, 4) for key, value in metrics.items()},
        "roc": thinned(*roc),
        "pro": thinned(rate[:below], overlap[:below]),
    }


def thinned(x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    """At most `POINTS` of a curve, spread evenly along its length, not along an axis, since both ends may be steep."""
    if len(x) > POINTS:
        along = np.concatenate([[0], np.cumsum(np.hypot(np.diff(x) / x[-1], np.diff(y)))])
        keep = np.unique(np.searchsorted(along, np.linspace(0, along[-1], POINTS)).clip(0, len(x) - 1))
        x, y = x[keep], y[keep]
    return [[round(float(a), 5), round(float(b), 5)] for a, b in zip(x, y, strict=True)]
