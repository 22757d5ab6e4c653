import numpy as np
import pytest

from glad_core import threshold


def test_conformal_quantile_keeps_its_promise() -> None:
    """Over many draws, a new score exceeds the quantile of n others with probability at most α."""
    rng = np.random.default_rng(0)
    exceeded = [rng.normal() > threshold.conformal_quantile(rng.normal(size=39).tolist(), 0.1) for _ in range(4000)]
    assert 0.08 < np.mean(exceeded) < 0.115
    assert threshold.conformal_quantile([3.0, 1.0, 2.0], 0.05) == 3.0  # too few for 5 %: the largest


def test_how_many_images_a_target_needs() -> None:
    assert [threshold.images_needed(target) for target in (0.5, 0.1, 0.05, 0.01)] == [1, 9, 19, 99]
    assert [threshold.images_needed(target, 0.95) for target in (0.5, 0.05, 0.01)] == [5, 59, 299]


@pytest.mark.parametrize("count", [59, 92, 93, 400])
def test_a_confident_threshold_is_seldom_too_low(count: int) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.uniform(size=(4000, count))
    thresholds = np.array([threshold.confident_threshold(scores, 0.05, 0.95) for scores in drawn])
    assert (1 - thresholds > 0.05).mean() < 0.06  # of uniform scores a share of 1 - x exceeds x
    # The next smaller score would not do.
    lower = np.array([scores[scores < found].max() for scores, found in zip(drawn, thresholds, strict=True)])
    assert (1 - lower > 0.05).mean() > 0.045
    with pytest.raises(ValueError, match="too few"):
        threshold.confident_threshold(drawn[0][:58], 0.05, 0.95)
