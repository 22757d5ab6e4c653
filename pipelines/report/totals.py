"""Totals over all results of a run, counted in one pass that holds the numbers of all images but no pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from pipelines.report.cards import HeatScale
from pipelines.report.truth import Truth
from pipelines.runs.query import is_decided, margin
from pipelines.runs.run import Run

# What a result can be: the first two without ground truth, the next four with it, the last in runs of older versions
# whose model gave no finite score.
KINDS = ("good", "anomalous", "correct", "false alarm", "miss", "hit", "undecided")
CALLED_ANOMALOUS = ("anomalous", "hit", "false alarm")
COLUMNS = ("margin", "score", "threshold", "is_anomalous", "stop_step", "stop_reason", "category")
BINS = 60


@dataclass
class Totals:
    """Counts over all results."""

    scores: list[np.ndarray] = field(default_factory=list)  # [2, N] each: scores; their margins
    kinds: list[np.ndarray] = field(default_factory=list)  # [N] each, indices into `KINDS`
    kind_counts: Counter[str] = field(default_factory=Counter)
    steps: Counter[tuple[int | None, str]] = field(default_factory=Counter)  # by stop step and stop reason
    categories: Counter[str] = field(default_factory=Counter)
    thresholds: set[float | None] = field(default_factory=set)
    misses: list[tuple[float, str]] = field(default_factory=list)  # score and image id

    def add(self, batch: pa.RecordBatch, kinds: list[str]) -> None:
        """Count a batch of `COLUMNS`, the margin as `query.margin`, given the kind of each result."""
        thresholds = [value if is_decided(value) else None for value in batch["threshold"].to_pylist()]
        reasons = batch["stop_reason"].to_pylist()
        scores, margins = (batch[name].to_numpy(zero_copy_only=False) for name in ("score", "margin"))
        decided = np.array([kind != "undecided" for kind in kinds])
        self.scores.append(np.stack([scores, margins])[:, decided])
        self.kinds.append(np.array([KINDS.index(kind) for kind in kinds], np.int8)[decided])
        self.kind_counts.update(kinds)
        self.steps.update(
            (step, reason or "none") for step, reason in zip(batch["stop_step"].to_pylist(), reasons, strict=True)
        )
        self.categories.update(name or "" for name in batch["category"].to_pylist())
        self.thresholds.update(thresholds)

    @property
    def threshold(self) -> float | None:
        """The threshold if all results share one, else None."""
        return next(iter(self.thresholds)) if len(self.thresholds) == 1 else None

    @property
    def several_thresholds(self) -> bool:
        """Whether scores only compare by their margins."""
        return len(self.thresholds) > 1 and None not in self.thresholds

    @property
    def called_anomalous(self) -> int | None:
        """Number of results called anomalous; None in a run without thresholds."""
        if self.thresholds == {None}:
            return None
        return sum(self.kind_counts[kind] for kind in CALLED_ANOMALOUS)

    def heat_scale(self) -> HeatScale:
        """The colour scale for all heat maps; of several thresholds it uses the middle one."""
        known = sorted(threshold for threshold in self.thresholds if threshold)
        return HeatScale.of(self._all_scores()[0], known[len(known) // 2] if known else None)

    def histogram(self) -> list[dict[str, Any]]:
        """Number of results by kind in each of `BINS` ranges of score, or of margin; empty ones left out."""
        scores = self._all_scores()[1 if self.several_thresholds else 0]
        if not len(scores):
            return []
        kinds = np.concatenate(self.kinds)
        edges = np.histogram_bin_edges(scores, bins=BINS)
        return [
            {"from": float(edges[index]), "to": float(edges[index + 1]), "kind": KINDS[kind], "count": int(number)}
            for kind in np.unique(kinds)
            for index, number in enumerate(np.histogram(scores[kinds == kind], bins=edges)[0])
            if number
        ]

    def _all_scores(self) -> np.ndarray:
        return np.concatenate(self.scores, axis=1) if self.scores else np.empty((2, 0))


def count(run: Run, results: pads.Dataset, truth: Truth | None = None) -> Totals:
    """Totals of all results; with ground truth their kinds are hit, miss, false alarm and correct.

    Raises:
        GladError: an image is not in the dataset of the ground truth.
    """
    totals = Totals()
    names = [*COLUMNS, "uri", "image_id"] if truth else COLUMNS
    columns = {name: margin(run) if name == "margin" else pads.field(name) for name in names}
    for batch in results.to_batches(columns=columns):
        if not len(batch):
            continue
        called_anomalous = batch["is_anomalous"].to_pylist()
        scores = batch["score"].to_pylist()
        decided = list(map(is_decided, scores, batch["threshold"].to_pylist()))
        if truth is None:
            kinds = ["anomalous" if anomalous else "good" for anomalous in called_anomalous]
        else:
            kinds = list(map(truth.verdict, batch["uri"].to_pylist(), called_anomalous))
        kinds = [kind if known else "undecided" for kind, known in zip(kinds, decided, strict=True)]
        if truth is not None:
            scored = zip(kinds, scores, batch["image_id"].to_pylist(), strict=True)
            totals.misses += [(score, image_id) for kind, score, image_id in scored if kind == "miss"]
        totals.add(batch, kinds)
    return totals
