import json
import shutil

import numpy as np
import pytest

from glad_core.bundle.glad_json import read_description, update_settings, verify, with_settings
from glad_core.bundle.good_scores import MOST_KEPT, kept, p_value
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError


def test_a_p_value_keeps_its_promise() -> None:
    """Of good pictures a share of at most α has a p-value of α or less, for every α."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(5000, 40))
    values = np.array([p_value(row[0], kept(row[1:])) for row in drawn.tolist()])
    for alpha in (0.025, 0.05, 0.1, 0.5, 1.0):
        assert alpha - 0.02 < (values <= alpha + 1e-9).mean() < alpha + 0.015


@pytest.mark.parametrize(
    ("score", "expected"),
    [(0.5, 1.0), (1.0, 1.0), (1.5, 4 / 5), (2.0, 4 / 5), (2.1, 2 / 5), (3.0, 2 / 5), (9.0, 1 / 5)],
)
def test_equal_scores_count_as_high(score: float, expected: float) -> None:
    assert p_value(score, kept([2.0, 1.0, 3.0, 2.0])) == expected
    assert p_value(score, []) is None


def test_scores_compare_in_single_precision_as_results_are_stored() -> None:
    assert p_value(0.1, kept([np.float32(0.1)])) == p_value(float(np.float32(0.1)), kept([0.1])) == 1.0


def test_of_many_scores_some_are_kept_whatever_they_are() -> None:
    ascending = kept(range(10 * MOST_KEPT))
    assert len(ascending) == MOST_KEPT
    assert ascending == sorted(ascending)
    assert np.mean(ascending) == pytest.approx(5 * MOST_KEPT, rel=0.01)  # not the largest, nor the smallest
    assert len(kept(range(MOST_KEPT + 1))) == len(set(kept(range(MOST_KEPT + 1)))) == MOST_KEPT


def test_a_bundle_for_many_categories_can_still_be_read(copy) -> None:
    scores = np.random.default_rng(0).normal(size=MOST_KEPT)
    give(copy, {f"category {number}": kept(scores, 200) for number in range(200)})
    assert len(verify(copy).provenance["good_scores"]["category 7"]) == 100


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def give(copy, scores, **changes) -> str:
    settings = Settings.parse(read_description(copy).settings | changes, "")
    return update_settings(copy, settings, {"good_scores": scores})


def test_scores_belong_to_the_settings_of_a_bundle(copy) -> None:
    ids = {verify(copy).model_id, give(copy, {"": [1.0, 2.0]}), give(copy, {"": [1.0, 3.0]})}
    assert len(ids) == 3  # other p-values, other verdicts
    model = load_bundle(copy)
    assert (model.p_value(2.5, None), model.p_value(4.0, "any")) == (2 / 3, 1 / 3)
    assert load_bundle(copy, settings=model.settings).p_value(2.5, None) is None
    by_hand = with_settings(read_description(copy), model.settings.model_copy(update={"threshold": 9.0}), {})
    assert "good_scores" not in by_hand.provenance


def test_a_category_with_a_threshold_of_its_own_has_scores_of_its_own(copy) -> None:
    give(copy, {"nut": [1.0], "": [5.0]}, thresholds={"nut": 1.0, "bolt": 1.0})
    model = load_bundle(copy)
    assert [model.p_value(2.0, category) for category in ("nut", "bolt", None)] == [0.5, None, 1.0]


@pytest.mark.parametrize(
    "scores",
    [
        [1.0],
        {"": []},
        {"": [2.0, 1.0]},
        {"": ["x"]},
        {"": [1e999]},
        {"": None},
        {"": 1.0},
        {"": [1.0] * (MOST_KEPT + 1)},
    ],
)
def test_damaged_scores_are_one_line(copy, scores) -> None:
    description = json.loads((copy / "glad.json").read_text())
    description["provenance"]["good_scores"] = scores
    (copy / "glad.json").write_text(json.dumps(description))
    with pytest.raises(GladError, match=r"glad\.json: damaged or of another program[^\n]*$"):
        load_bundle(copy)


def test_scores_that_were_changed_by_hand_are_refused(copy) -> None:
    give(copy, {"": [1.0, 2.0]})
    text = (copy / "glad.json").read_text()
    (copy / "glad.json").write_text(text.replace("2.0\n", "1.5\n"))
    assert text != (copy / "glad.json").read_text()
    with pytest.raises(GladError, match="changed by hand"):
        load_bundle(copy)
