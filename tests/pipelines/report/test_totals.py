"""Totals over all results, with and without ground truth."""

import numpy as np
import pytest
from judged_run import make_judged_run

from pipelines.archive.layouts import read_dataset
from pipelines.report.totals import Totals, count
from pipelines.report.truth import Truth


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_bundle):
    return make_judged_run(tmp_path_factory.mktemp("totals"), tiny_bundle)


def test_kinds_are_verdicts_without_ground_truth_and_hits_and_misses_with_it(judged) -> None:
    run, data, rows = judged
    anomalous = sum(row["is_anomalous"] for row in rows)
    totals = count(run, run.results())
    assert totals.kind_counts == {"anomalous": anomalous, "good": len(rows) - anomalous}
    assert totals.misses == []
    totals = count(run, run.results(), Truth(read_dataset(str(data), run.storage)))
    assert totals.kind_counts == {"correct": 34, "false alarm": 2, "hit": 22, "miss": 2}
    assert totals.called_anomalous == anomalous == 24
    missed = [row for row in rows if "/cut/" in row["uri"] and not row["is_anomalous"]]
    assert sorted(totals.misses) == sorted((float(np.float32(row["score"])), row["image_id"]) for row in missed)


def test_several_thresholds_make_the_unit_of_the_histogram(judged) -> None:
    run, data, rows = judged
    totals = count(run, run.results(), Truth(read_dataset(str(data), run.storage)))
    assert totals.several_thresholds
    assert totals.threshold is None
    histogram = totals.histogram()
    assert sum(part["count"] for part in histogram) == len(rows) == 60
    assert all(part["to"] > 1 for part in histogram if part["kind"] in ("hit", "false alarm"))
    assert all(part["from"] < 1 for part in histogram if part["kind"] in ("correct", "miss"))
    assert totals.heat_scale().low == 0.5  # half the larger of two thresholds


def test_steps_are_counted_with_their_reasons(judged) -> None:
    steps = count(judged.run, judged.run.results()).steps
    for step, reason in ((350, "difference"), (250, "difference"), (150, "min_step")):
        assert steps[step, reason] == sum(row["stop_step"] == step for row in judged.rows)


def test_no_results_and_no_thresholds() -> None:
    assert Totals().histogram() == []
    assert Totals().called_anomalous == 0
    assert Totals(thresholds={None}).called_anomalous is None
    assert not Totals(thresholds={None, 1.0}).several_thresholds
    assert Totals(thresholds={1.0}).threshold == 1.0
