import pytest

from glad_core.bundle.settings import Settings, View
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


@pytest.mark.parametrize(
    ("tiles", "features", "side", "scale"),
    [
        (0.3, 256, 256, 0.6),  # the same part of the picture in more detail
        (1.0, 256, 256, 1.0),  # never larger than the picture's own, but more of it
        (0.8, 256, 256, 1.0),
        (2.0, 256, 256, 2.0),  # asked for
        (1.0, 128, 128, 1.0),
        (1.0, 64, 64, 0.5),
    ],
)
def test_good_patches_see_tiles_as_large_as_the_features_take_them(tiles, features, side, scale) -> None:
    views = (View(kind="fit", good_mean=3.0), View(kind="tiles", scale=tiles, overlap=0.5))
    settings = Settings(resolution=128, feature_resolution=features, views=views)
    nearest = settings.judged_by("nearest")
    assert [view.kind for view in nearest.views] == ["fit", "fit", "tiles"]
    assert [view.good_mean for view in nearest.views] == [0.0] * 3  # another method's scores
    whole, half, cut = nearest.framings()
    assert (whole.side, half.side) == (features, features // 2)
    assert (cut.side, cut.scale, cut.overlap) == (side, scale, 0.5)
    assert nearest.judged_by("nearest") is nearest
    back = nearest.judged_by("glad")
    assert [(view.kind, view.scale) for view in back.views] == [("fit", 1.0), ("tiles", tiles)]
    assert [(framing.side, framing.scale) for framing in back.framings()] == [(128, 1.0), (128, tiles)]


def test_every_kind_of_view_can_be_seen_by_good_patches() -> None:
    settings = Settings(views=(View(), View(kind="fit"), View(kind="tiles")))
    assert Settings.parse(settings.judged_by("nearest").model_dump(), "x").judged_by("glad").views == settings.views
