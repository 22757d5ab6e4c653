import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glad_core.engine.search import first_crossing, fit_guess, guess_scores, largest_fall, next_comparison

CURVES = st.lists(st.floats(0, 1, width=16), min_size=1, max_size=14)


def search(curve, delta, fall, guessed=None):
    """The scores a search asks for, until it asks for no more."""
    scores = {}
    while (k := next_comparison(scores, len(curve), delta, fall, guessed)) is not None:
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


@given(CURVES, st.floats(2**-10, 1, width=16), st.lists(st.floats(-20, 20), min_size=14, max_size=14))
def test_a_wrong_guess_changes_no_answer(curve, delta, guess):
    fall = largest_fall(np.array([curve]))
    scores = search(curve, delta, fall, guess[: len(curve)])
    assert first_crossing(scores, delta) == first_crossing(search(curve, delta, None), delta)


def test_a_right_guess_compares_the_crossing_and_the_step_before():
    curve = [2, 3, 4.5, 6.8, 10, 15, 22, 34]
    assert sorted(search(curve, 5, 0.0, np.log(curve).tolist())) == [2, 3]
    assert list(search(curve, 50, 0.0, np.log(curve).tolist())) == [7]
    # Wrong by a factor: the first comparison says by which.
    assert len(search(curve, 5, 0.0, (np.log(curve) + 1.5).tolist())) == 3


def test_the_guess_is_learned_from_how_fast_images_depart():
    rng = np.random.default_rng(0)
    growth = rng.uniform(0, 0.3, (60, 1))
    departures = 0.2 * np.exp(growth * np.arange(8))
    scores = np.exp(-4 + 2 * growth + (0.1 + 3 * growth) * np.arange(8))
    guess = fit_guess(scores, departures)
    np.testing.assert_allclose(guess, (-4, 2, 0.1, 3), atol=1e-6)
    np.testing.assert_allclose(guess_scores(departures[0, :5].tolist(), guess), np.log(scores[0, :5]), atol=1e-6)
    assert fit_guess(scores[:, :1], departures[:, :1]) is None


@pytest.mark.parametrize(
    ("curve", "comparisons"), [([1, 2, 3, 4], 1), ([1, 2, 7, 8, 9, 9, 9, 9], 4), ([2, 3, 4.5, 6.8, 10, 15, 22, 34], 3)]
)
def test_rising_scores_need_few_comparisons(curve, comparisons):
    assert len(search(curve, 5, 0.0)) == comparisons


def test_the_largest_fall_is_from_any_step_to_any_later_one():
    assert largest_fall(np.array([[1.0, 3.0, 2.5, 0.5, 4.0], [0.0, 1.0, 1.0, 2.0, 3.0]])) == 2.5
    assert largest_fall(np.array([[0.0, 1.0]])) == 0
