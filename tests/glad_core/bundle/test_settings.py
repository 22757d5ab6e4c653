import pytest

from glad_core.bundle.settings import Settings
from glad_core.errors import GladError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start_stepp": 3}, "x: unknown setting 'start_stepp'; did you mean 'start_step'?"),
        ({"start_step": 0}, "x: start_step: Input should be greater than or equal to 1"),
        ({"variant": "other"}, "x: variant: Input should be 'official' or 'paper'"),
        ({"start_step": 5, "inference_steps": 9}, "x: inference_steps 9 is larger than start_step 5: lower it"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(values: dict, message: str) -> None:
    with pytest.raises(GladError) as caught:
        Settings.parse(values, "x")
    assert str(caught.value) == message


def test_a_category_has_its_own_threshold_or_the_bundles() -> None:
    settings = Settings(threshold=1.0, thresholds={"nut": 2.0})
    assert [settings.threshold_for(category) for category in ("nut", "bolt", None)] == [2.0, 1.0, 1.0]
    assert Settings().threshold_for("nut") is None
