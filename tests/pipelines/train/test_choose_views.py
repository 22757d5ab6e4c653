import pytest

from glad_core.bundle.settings import View
from glad_core.views import Framing
from pipelines.train.choose_views import MOST_TILES, choose_views, usual_size


def kinds(sizes, resolution=128):
    return [view.kind for view in choose_views(sizes, resolution)[0]]


def test_small_squares_are_one_square():
    assert choose_views([(128, 128)] * 5, 128)[0] == (View(),)
    assert kinds([(200, 240), (190, 256)]) == ["squash"]


def test_long_pictures_of_several_shapes_keep_their_aspect_ratio():
    assert kinds([(100, 250), (120, 200), (200, 90)]) == ["fit"]
    assert kinds([(100, 250)] * 9) == ["squash"]  # all alike: so are what the model learns and what it judges
    assert kinds([(200, 200)] * 99 + [(100, 250)]) == ["squash"]


@pytest.mark.parametrize("size", [(257, 100), (768, 1024), (2048, 2448), (10_000, 10_000), (300, 4000)])
def test_large_pictures_are_cut_into_a_bounded_number_of_tiles(size):
    views, reason = choose_views([size] * 3, 128)
    assert [view.kind for view in views] == ["squash", "tiles"]
    tiles = Framing("tiles", 128, views[1].scale, views[1].overlap).places(*size)
    assert 1 < len(tiles) <= MOST_TILES
    assert f"{len(tiles)} tiles" in reason
    assert f"{size[1]} x {size[0]} pixels" in reason


def test_the_usual_size_is_the_median():
    assert usual_size([(10, 20), (30, 40), (1000, 2000)]) == (30, 40)
