"""One verdict per picture."""

import numpy as np
import pytest

from glad_core.bundle.settings import Settings, View
from glad_core.scoring import full_size_map, image_score
from glad_core.stitch import _weighted_mean, combined_score, standards, stitch, tile_requests, view_scores
from glad_core.verdict import Detection

R, D, G = 64, 128, 16
COMMON = {"resolution": R, "feature_resolution": D, "blur_sigma": 2.0, "image_score_top_k": 30}


def settings(*views: View) -> Settings:
    return Settings(**COMMON, views=views)


def judged(by_view, height, width, spot=None):
    """Detections whose maps hold a spot at one place of the picture, in every tile that sees it."""
    out = []
    for framing, requests in by_view:
        found = []
        h, w = framing.covered(height, width)
        for (top, left), request in zip(framing.places(height, width), requests, strict=True):
            anomaly_map = np.full((G, G), 0.1, np.float32)
            if spot is not None:
                rows = (np.arange(G) + 0.5) * R / G + top - spot[0] * h / height
                columns = (np.arange(G) + 0.5) * R / G + left - spot[1] * w / width
                anomaly_map += np.exp(-(rows[:, None] ** 2 + columns**2) / 200).astype(np.float32)
            score = float(image_score(full_size_map(torch_of(anomaly_map), settings(View())), 30))
            found.append(
                Detection(request.image_id, score, 100 + top, "difference", [], anomaly_map, request.image, 1.0)
            )
        out.append(found)
    return out


def torch_of(array):
    import torch

    return torch.from_numpy(array)[None]


def verdict(s, picture, spot=None):
    size = picture.shape[:2]
    frames = [framing.frame(picture) for framing in s.framings()]
    by_view = tile_requests("a", frames, s, size)
    return stitch(s, size, judged(zip(s.framings(), by_view, strict=True), *size, spot))


PICTURE = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
TILES = View(kind="tiles", scale=1.0, overlap=0.25)


def test_one_square_keeps_its_verdict():
    found = verdict(settings(View()), PICTURE)
    assert found.tiles == []
    assert found.full_size is None
    assert found.anomaly_map.shape == (G, G)


def test_a_picture_of_tiles_has_one_map_of_its_shape():
    found = verdict(settings(TILES), PICTURE, spot=(100, 150))
    rows, columns = found.anomaly_map.shape
    assert (rows, columns) == (round(200 * G / R), round(300 * G / R))
    assert found.full_size == (rows * D // G, columns * D // G)
    assert abs(found.anomaly_map.argmax() // columns - rows / 2) <= 1
    assert found.reconstruction.shape == (200, 300, 3)
    assert (found.reconstruction == PICTURE).all()  # the tiles are the input's own here
    assert len(found.tiles) == len(settings(TILES).framings()[0].places(200, 300))
    worst = max(found.tiles, key=lambda tile: tile.score)
    assert found.stop_step == worst.stop_step
    assert worst.top <= 100 <= worst.top + worst.height
    assert worst.left <= 150 <= worst.left + worst.width
    for tile in found.tiles:
        assert 0 <= tile.top < tile.top + tile.height <= 200
        assert 0 <= tile.left < tile.left + tile.width <= 300


def test_a_defect_on_a_seam_scores_as_one_inside():
    s = settings(TILES)
    scores = [verdict(s, PICTURE, spot=(100, column)).score for column in range(60, 240, 6)]
    assert max(scores) - min(scores) < 0.05 * max(scores)


def test_a_picture_smaller_than_a_tile_is_judged_where_it_is():
    found = verdict(settings(TILES), PICTURE[:40, :100], spot=(20, 50))
    assert found.anomaly_map.shape[0] == round(40 * G / R)
    assert found.score > 0.5


def test_the_most_anomalous_view_decides():
    views = (View(good_mean=0.5, good_spread=0.1), TILES.model_copy(update={"good_mean": 0.2, "good_spread": 0.4}))
    s = settings(*views)
    frames = [framing.frame(PICTURE) for framing in s.framings()]
    by_view = judged(zip(s.framings(), tile_requests("a", frames, s, (200, 300)), strict=True), 200, 300, (90, 90))
    raw = view_scores(s, (200, 300), by_view)
    found = stitch(s, (200, 300), by_view)
    expected = [(raw[0] - 0.5) / 0.1, (raw[1] - 0.2) / 0.4]
    assert found.score == pytest.approx(max(expected))
    assert combined_score(s, raw) == pytest.approx(max(expected))
    assert found.anomaly_map.shape == (50, 75)  # that of the tiles
    assert {tile.view for tile in found.tiles} == {"squash", "tiles"}


def test_the_more_anomalous_a_picture_is_in_a_view_the_more_its_map_counts():
    coarse, fine = np.full((2, 3), 4.0, np.float32), np.zeros((4, 6), np.float32)
    assert _weighted_mean([coarse, fine], [1.0, 1.0], (4, 6)) == pytest.approx(np.full((4, 6), 2.0))
    assert _weighted_mean([coarse, fine], [2.0, 1.0], (4, 6)) == pytest.approx(np.full((4, 6), 4 / (1 + np.exp(-2))))
    assert _weighted_mean([coarse, fine], [1.0, 9.0], (4, 6)) == pytest.approx(np.zeros((4, 6)), abs=1e-5)


def test_standards_are_of_several_views_alone():
    assert standards(np.array([[1.0], [3.0]])) == [(0.0, 1.0)]
    assert standards(np.array([[1.0, 5.0], [3.0, 5.0]])) == [(2.0, 1.0), (5.0, 1.0)]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 900), (900, 7)])
@pytest.mark.parametrize("view", [View(kind="fit"), View(kind="tiles"), View(kind="tiles", scale=0.1)])
def test_strips_and_specks_have_a_verdict_too(size, view):
    """Their maps are narrower than the filter that smooths them."""
    found = verdict(settings(View(good_mean=0.1), view), np.zeros((*size, 3), np.uint8))
    assert np.isfinite(found.score)
    assert min(found.anomaly_map.shape) >= 1
