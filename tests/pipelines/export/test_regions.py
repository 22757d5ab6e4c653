"""Outlines of what is above a threshold, and texts that spreadsheets would run."""

import numpy as np
import pytest

from pipelines.export.images import name_in, regions
from pipelines.export.verdicts import _cell


def painted(*boxes, shape=(20, 30)):
    values = np.zeros(shape, np.float32)
    for top, left, bottom, right, value in boxes:
        values[top:bottom, left:right] = value
    return values


def test_regions_lie_in_pixels_of_the_picture() -> None:
    first, second = sorted(
        regions(painted((2, 3, 8, 12, 2), (12, 20, 16, 25, 5)), 1.0, (300, 400)), key=lambda region: region.score
    )
    assert (first.score, second.score) == (2, 5)
    ((left, top), (right, bottom)) = first.rings[0].min(axis=0), first.rings[0].max(axis=0)
    assert np.abs(np.array([left, right]) - [30, 120]).max() <= 5  # half a value of the map
    assert np.abs(np.array([top, bottom]) - [40, 160]).max() <= 10


def test_a_region_at_the_edge_ends_there_and_a_hole_is_a_ring() -> None:
    (whole,) = regions(painted((0, 0, 20, 30, 3)), 1.0, (60, 40))
    assert whole.rings[0].min(axis=0).tolist() == [0, 0]
    assert whole.rings[0].max(axis=0).tolist() == [60, 40]
    (ring,) = regions(painted((2, 2, 18, 28, 3), (8, 8, 12, 20, 0)), 1.0, (30, 20))
    assert len(ring.rings) == 2
    assert np.abs(ring.rings[1].min(axis=0) - [8, 8]).max() <= 0.5


def test_regions_of_one_value_touching_corners_and_none() -> None:
    assert regions(painted(), 1.0, (30, 20)) == []
    found = regions(painted((4, 4, 8, 8, 2), (8, 8, 12, 12, 3)), 1.0, (30, 20))
    assert sum(len(region.rings) for region in found) == len(found)
    assert max(region.score for region in found) == 3
    assert len(regions(painted((5, 5, 6, 6, 2)), 1.0, (30, 20))) == 1
    assert len(regions(np.full((1, 1), 2, np.float32), 1.0, (30, 20))) == 1


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x", "\tx", "\rx"])
def test_a_text_never_is_a_formula(text) -> None:
    assert _cell(text) == f"'{text}"


@pytest.mark.parametrize(("value", "written"), [(0.1, "0.1"), (-1.5, "-1.5"), ('a,b"ü', 'a,b"ü'), (None, None)])
def test_numbers_and_plain_texts_stay(value, written) -> None:
    assert _cell(value) == written


@pytest.mark.parametrize(
    ("source", "uri", "name"),
    [
        ("/data", "/data/line/a.png", "line/a.png"),
        ("/data", "/data2/a.png", "/data2/a.png"),
        ("s3://b/x", "s3://b/x/a,b.png", "a,b.png"),
        ("/data/t.tar", "tar://in/a.png::/data/t.tar", "in/a.png"),
        ("/data", "tar://in/a.png::/data/t.tar", "t.tar/in/a.png"),
        ("s3://b/x/*/a?.png", "s3://b/x/1/a2.png", "1/a2.png"),
        ("/data", "file:///data/bad%FF.png", "file:///data/bad%FF.png"),
    ],
)
def test_names_within_the_source(source, uri, name) -> None:
    assert name_in(source, uri) == name
