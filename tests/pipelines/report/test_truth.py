"""Ground truth of a report: verdicts, and curves thinned without losing their shape."""

import numpy as np
import pytest
from judged_run import make_judged_run

from glad_core.errors import GladError
from pipelines.archive.layouts import read_dataset
from pipelines.report.truth import POINTS, Truth, curves, thinned


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_bundle):
    return make_judged_run(tmp_path_factory.mktemp("truth"), tiny_bundle)


def test_verdicts(judged) -> None:
    truth = Truth(read_dataset(str(judged.data), judged.run.storage))
    cut, good = (next(row["uri"] for row in judged.rows if kind in row["uri"]) for kind in ("/cut/", "/good/"))
    assert [truth.verdict(cut, called) for called in (True, False, None)] == ["hit", "miss", "anomalous"]
    assert [truth.verdict(good, called) for called in (True, False, None)] == ["false alarm", "correct", "good"]
    with pytest.raises(GladError, match="not in the dataset"):
        truth.verdict("/elsewhere/000.jpg", True)


def test_a_thinned_curve_keeps_its_ends_and_its_steep_part() -> None:
    x = np.linspace(0, 1, 20_000)
    y = np.minimum(1, x / 0.001)  # steep, then flat
    points = np.array(thinned(x, y))
    assert len(points) <= POINTS
    assert points[0].tolist() == [0, 0]
    assert points[-1].tolist() == [1, 1]
    assert ((points[:, 1] > 0.1) & (points[:, 1] < 0.9)).sum() > 5  # of which even spacing along x would leave none
    assert thinned(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == [[0, 0], [1, 1]]


@pytest.mark.slow
def test_curves_of_a_run(judged, ray_session) -> None:
    bottle, cable = curves(judged.run, read_dataset(str(judged.data), judged.run.storage))
    assert (bottle["category"], cable["category"]) == ("bottle", "cable")
    for category in (bottle, cable):
        assert 0.5 < category["metrics"]["I-AUROC"] < 1  # one of twelve is missed
        assert category["roc"][0] == [0, 0]
        assert category["roc"][-1] == [1, 1]
        assert all(rate <= 0.3 for rate, _ in category["pro"])
