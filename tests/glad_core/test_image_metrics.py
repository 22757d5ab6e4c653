import numpy as np
import pytest
from oracles import auroc_by_pairs, f1_and_ap_by_counting

from glad_core.image_metrics import auroc_interval, image_metrics, pooled_chi_squared


def test_equal_scores_have_an_auroc_of_a_half() -> None:
    assert image_metrics(np.ones(4), np.array([0, 1, 0, 1]))["AUROC"] == 0.5


def test_image_metrics_against_counting_and_free_of_scale() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random(40) > 0.5).astype(int)
    scores = np.round(rng.random(40) + 0.4 * labels, 1)
    got = image_metrics(scores, labels)
    f1, ap = f1_and_ap_by_counting(scores, labels)
    assert got == pytest.approx({"AUROC": auroc_by_pairs(scores, labels), "AP": ap, "F1max": f1}, abs=1e-12)
    assert image_metrics(1000 + 64 * scores, labels) == pytest.approx(got, abs=1e-12)


def test_the_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 40])
    covered = 0
    for seed in range(60):
        low, high = auroc_interval(rng.normal(size=100) + labels, labels, seed)
        covered += low <= 0.7602 <= high  # P(x + 1 > y) of two normals
    assert 51 <= covered <= 60


def test_chi_squared_false_alarms_keep_their_rate() -> None:
    rng = np.random.default_rng(0)
    values = [
        pooled_chi_squared(rng.choice([300, 480, 750], 200), rng.choice([300, 480, 750], 200)) for _ in range(400)
    ]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09
    assert pooled_chi_squared(np.full(50, 300), np.full(50, 300)) == 1


@pytest.mark.parametrize("sizes", [(1, 1), (3, 200)])
def test_chi_squared_of_small_samples_is_a_probability(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    assert 0 <= pooled_chi_squared(rng.choice([1, 2], sizes[0]), rng.choice([1, 2], sizes[1])) <= 1
