"""Frames and tiles of pictures of any size and shape, and one map from many."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glad_core.views import Framing, blend, cut, join

SIDES = st.integers(1, 300)
TILES = st.builds(
    Framing, st.just("tiles"), st.sampled_from([16, 32, 64]), st.floats(0.2, 2.0), st.sampled_from([0.0, 0.25, 0.5])
)


@given(framing=TILES, height=SIDES, width=SIDES)
def test_tiles_cover_the_frame_and_overlap_as_much_as_asked(framing, height, width):
    size, places = framing.size(height, width), framing.places(height, width)
    seen = np.zeros(size, int)
    for top, left in places:
        assert top % (framing.side // 16) == left % (framing.side // 16) == 0
        seen[top : top + framing.side, left : left + framing.side] += 1
    assert seen.min() >= 1
    assert len(places) == len(set(places))
    assert {top for top, _ in places} >= {0, size[0] - framing.side}
    for starts in ({top for top, _ in places}, {left for _, left in places}):
        steps = np.diff(sorted(starts))
        assert not len(steps) or steps.max() <= framing.side * (1 - framing.overlap) + framing.side / 16
    h, w = framing.covered(height, width)
    assert h <= size[0]
    assert w <= size[1]
    assert abs(h - height * framing.scale) <= framing.side / 16 + 1


@given(framing=TILES, height=SIDES, width=SIDES)
def test_a_frame_cut_and_joined_is_the_picture_again(framing, height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    frame = framing.frame(picture)
    assert frame.shape[:2] == framing.size(height, width)
    places, covered = framing.places(height, width), framing.covered(height, width)
    joined = join(cut(frame, places, framing.side), places, covered)
    assert (joined == frame[: covered[0], : covered[1]]).all()


@given(framing=TILES, height=SIDES, width=SIDES)
def test_a_map_that_tiles_agree_on_is_that_map(framing, height, width):
    """Whatever the weights: a function of the place in the frame comes out as it is, without seams."""
    size, places, covered = framing.size(height, width), framing.places(height, width), framing.covered(height, width)
    g = 16
    rows, columns = (length * g // framing.side for length in size)
    whole = np.random.default_rng(1).random((rows, columns), dtype=np.float32)
    maps = [
        whole[(top := t * g // framing.side) : top + g, (left := x * g // framing.side) : left + g] for t, x in places
    ]
    blended = blend(maps, places, covered, framing.side)
    h, w = blended.shape
    assert (h, w) == tuple(max(1, round(length * g / framing.side)) for length in covered)
    np.testing.assert_allclose(blended, whole[:h, :w], rtol=1e-5)


def test_a_seam_between_tiles_that_differ_is_a_ramp():
    framing = Framing("tiles", 64, overlap=0.5)
    places = framing.places(64, 160)
    maps = [np.full((16, 16), float(number)) for number in range(len(places))]
    blended = blend(maps, places, (64, 160), 64)
    assert np.abs(np.diff(blended, axis=1)).max() < 0.3
    assert (blended[:, 0], blended[:, -1]) == (pytest.approx(0), pytest.approx(len(places) - 1))


def test_squash_fits_and_tiles_of_a_long_picture():
    picture = np.zeros((100, 400, 3), np.uint8)
    picture[:, 380:] = 255
    squash, fit, tiles = (Framing(kind, 64).frame(picture) for kind in ("squash", "fit", "tiles"))
    assert squash.shape == fit.shape == (64, 64, 3)
    assert Framing("fit", 64).covered(100, 400) == (16, 64)
    assert (fit[:16] == fit[16:32][::-1]).all()  # filled with its mirror image
    assert tiles.shape[0] == 100
    assert Framing("squash", 64).places(100, 400) == Framing("fit", 64).places(100, 400) == [(0, 0)]
    assert len(Framing("tiles", 64).places(100, 400)) == 2 * 8


@given(height=st.integers(1, 200), width=st.integers(1, 200))
def test_a_square_of_the_right_size_is_not_touched(height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    for kind in ("squash", "fit", "tiles"):
        framing = Framing(kind, 64)
        assert framing.frame(picture).dtype == np.uint8
        if (height, width) == (64, 64):
            assert framing.frame(picture) is picture
