"""What ground truth adds to a report: hits, misses and false alarms, ROC and PRO curves by category."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from cluster import session
from cluster.storage import Storage
from pipelines.evaluate.datasets import Example
from pipelines.evaluate.tables import Tally, find_example, tally_results

POINTS = 200  # of a curve
PRO_LIMIT = 0.3  # false positive rate up to which PRO counts
VERDICTS = {(True, True): "hit", (True, False): "miss", (False, True): "false alarm", (False, False): "correct"}


class Truth:
    """A dataset's labels, by what ends the URI of a scored image."""

    def __init__(self, examples: list[Example]) -> None:
        self.by_path = {example.path: example for example in examples}

    def verdict(self, uri: str, anomalous: bool | None) -> str:
        """hit, miss, false alarm or correct; without a threshold, anomalous or good.

        Raises:
            GladError: the image is not in the dataset.
        """
        truly = find_example(uri, self.by_path).anomalous
        if anomalous is None:
            return "anomalous" if truly else "good"
        return VERDICTS[truly, anomalous]


def curves(folder: str, run: dict[str, Any], examples: list[Example], storage: Storage) -> list[dict[str, Any]]:
    """Per category its name, metrics and the points of its ROC and PRO curves, counted on Ray."""
    session.connect()
    tallies = tally_results(folder, run, examples, storage)
    return [_of_category(name, tallies[name]) for name in sorted(tallies)]


def _of_category(name: str, tally: Tally) -> dict[str, Any]:
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
        "roc": _thinned(*roc),
        "pro": _thinned(rate[:below], overlap[:below]),
    }


def _thinned(x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    """At most `POINTS` of a curve, evenly spread along its length rather than its axis: both ends may be steep."""
    if len(x) > POINTS:
        along = np.concatenate([[0], np.cumsum(np.hypot(np.diff(x) / x[-1], np.diff(y)))])
        keep = np.unique(np.searchsorted(along, np.linspace(0, along[-1], POINTS)).clip(0, len(x) - 1))
        x, y = x[keep], y[keep]
    return [[round(float(a), 5), round(float(b), 5)] for a, b in zip(x, y, strict=True)]
