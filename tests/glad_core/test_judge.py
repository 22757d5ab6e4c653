from dataclasses import replace

import numpy as np
import pytest
import torch

from glad_core.bundle.model import Model, load_bundle
from glad_core.judge import detect, image_noise, map_at_full_size, prepare
from glad_core.scoring import full_size_only, image_score
from glad_core.verdict import Request


@pytest.fixture(scope="module")
def model(tiny_bundle) -> Model:
    return load_bundle(tiny_bundle)


def pictures(model: Model, count: int = 3) -> list[Request]:
    side = model.settings.resolution
    rng = np.random.default_rng(2)
    return [Request(str(index), rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for index in range(count)]


def test_noise_depends_on_seed_and_pixels_alone() -> None:
    one = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    other = one.copy()
    other[7, 7, 2] ^= 1
    first = image_noise(one, 0, (4, 2, 2))
    copies = image_noise(np.asfortranarray(one), 0, (4, 2, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, copies, strict=True))
    assert not torch.equal(first[0], image_noise(other, 0, (4, 2, 2))[0])
    assert not torch.equal(first[0], image_noise(one, 1, (4, 2, 2))[0])
    assert not torch.equal(*first)


def test_a_renamed_picture_keeps_its_verdict(model: Model) -> None:
    (request,) = pictures(model, 1)
    one, other = (next(detect(model, [replace(request, image_id=name)])) for name in ("a", "line-4/b"))
    assert (one.score, one.stop_step, one.steps) == (other.score, other.stop_step, other.steps)
    assert np.array_equal(one.anomaly_map, other.anomaly_map)


def test_requests_become_pixels_between_minus_one_and_one(model: Model) -> None:
    side = model.settings.resolution
    black = np.zeros((side, side, 3), np.uint8)
    white_corner = black.copy()
    white_corner[0, 1] = (255, 0, 51)
    inputs = prepare(model, [Request("a", black), Request("b", white_corner)], seed=0)
    assert inputs.images.shape == (2, 3, side, side)
    assert torch.equal(inputs.images[0], torch.full((3, side, side), -1.0))
    torch.testing.assert_close(inputs.images[1, :, 0, 1], torch.tensor([1.0, -1.0, -0.6]))
    assert torch.equal(inputs.eps[0], image_noise(black, 0, tuple(inputs.eps.shape[1:]))[0])


@pytest.mark.parametrize("changes", [{}, {"pixel_weight_v": 1.0}, {"foreground_mode": 1}])
def test_the_score_is_that_of_the_stored_map_at_full_size(model: Model, changes: dict) -> None:
    changed = replace(model, settings=model.settings.model_copy(update=changes))
    s = changed.settings
    for detection in detect(changed, pictures(model)):
        assert detection.anomaly_map.shape == ((32, 32) if full_size_only(s) else (4, 4))
        full = map_at_full_size(s, detection)
        assert full.shape == (32, 32)
        assert float(image_score(full[None], s.image_score_top_k)[0]) == pytest.approx(detection.score, rel=2e-3)


def test_a_verdict_depends_on_no_neighbour(model: Model) -> None:
    changed = replace(model, settings=model.settings.model_copy(update={"delta": 0.0, "pixel_weight_v": 1.0}))
    together = list(detect(changed, pictures(model)))
    for request, expected in zip(pictures(model), together, strict=True):
        (alone,) = detect(changed, [request])
        assert alone.score == pytest.approx(expected.score, abs=1e-4)
    assert list(detect(changed, [])) == []
