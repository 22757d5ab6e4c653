import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glad_core.search import first_crossing, largest_fall, next_comparison

CURVES = st.lists(st.floats(0, 1, width=16), min_size=1, max_size=14)


def search(curve, delta, fall):
    """The scores a search asks for, until it asks for no more."""
    scores = {}
    while (k := next_comparison(scores, len(curve), delta, fall)) is not None:
        assert k not in scores
        scores[k] = curve[k]
    return scores


@given(CURVES, st.floats(2**-10, 1, width=16))
def test_a_scan_stops_at_the_first_crossing(curve, delta):
    crossing = next((k for k, score in enumerate(curve) if score > delta), None)
    scores = search(curve, delta, None)
    assert list(scores) == list(range(len(curve) if crossing is None else crossing + 1))
    assert first_crossing(scores, delta) == crossing


@given(CURVES, st.floats(2**-10, 1, width=16))
def test_guarded_by_its_own_fall_a_curve_hides_no_crossing(curve, delta):
    fall = largest_fall(np.array([curve]))
    assert first_crossing(search(curve, delta, fall), delta) == first_crossing(search(curve, delta, None), delta)


@pytest.mark.parametrize(
    ("curve", "asked"), [([1, 2, 3, 4], 1), ([1, 2, 7, 8, 9, 9, 9, 9], 4), ([2, 3, 4.5, 6.8, 10, 15, 22, 34], 3)]
)
def test_rising_scores_need_few_comparisons(curve, asked):
    assert len(search(curve, 5, 0.0)) == asked


def test_the_largest_fall_is_from_any_step_to_any_later_one():
    assert largest_fall(np.array([[1.0, 3.0, 2.5, 0.5, 4.0], [0.0, 1.0, 1.0, 2.0, 3.0]])) == 2.5
    assert largest_fall(np.array([[0.0, 1.0]])) == 0
