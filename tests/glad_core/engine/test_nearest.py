import numpy as np
import pytest
import torch

from glad_core.bundle.model import load_bundle
from glad_core.engine import nearest
from glad_core.engine.base import run
from glad_core.images import to_tensor
from glad_core.verdict import NotFinite, Request

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return load_bundle(tiny_bundle)


def test_features_are_unit_length_and_smoothed_over_their_neighbours(model) -> None:
    patches = nearest.patch_features(model, to_tensor(IMAGES))
    assert patches.shape == (6, 16, 4 * 32)
    torch.testing.assert_close(patches.norm(dim=2), torch.ones(6, 16))
    moved = IMAGES[0].copy()
    moved[:8, :8] = 255 - moved[:8, :8]  # the first patch alone
    changed = (nearest.patch_features(model, to_tensor([moved]))[0] - patches[0]).abs().amax(dim=1)
    assert changed[0] > changed[-1]


def test_scores_are_distances_to_the_nearest_remembered_patch(model) -> None:
    memory = nearest.remember(nearest.patch_features(model, to_tensor(IMAGES[:4])).flatten(0, 1))
    detections = list(nearest.detect_nearest(model, memory, [Request(str(i), image) for i, image in enumerate(IMAGES)]))
    patches = nearest.patch_features(model, to_tensor(IMAGES))
    for row, detection in enumerate(detections):
        expected = [min(1 - float(patch @ other) for other in memory) for patch in patches[row]]
        np.testing.assert_allclose(detection.anomaly_map.ravel(), expected, atol=1e-3)
        assert detection.stop_step is None
        assert detection.steps == []
    scores = [detection.score for detection in detections]
    assert max(scores[:4]) < 1e-3  # remembered
    assert min(scores[4:]) > 10 * max(scores[:4])


def test_the_memory_covers_good_patches_better_than_a_random_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "REMEMBERED", 20)
    generator = torch.Generator().manual_seed(0)
    crowded = torch.randn(2000, 16, generator=generator) * 0.1
    rare = torch.randn(10, 16, generator=generator) * 3
    patches = torch.cat([crowded, rare])
    memory = nearest.remember(patches)
    assert memory.shape == (20, 16)
    reach = torch.cdist(patches, memory).amin(dim=1).max()
    blind = torch.cdist(patches, patches[torch.randperm(2010, generator=generator)[:20]]).amin(dim=1).max()
    assert reach < 0.5 * blind
    assert torch.equal(nearest.remember(patches), memory)


def test_an_image_without_finite_features_costs_only_itself(model, monkeypatch) -> None:
    real = nearest.patch_features
    memory = nearest.remember(real(model, to_tensor(IMAGES[:4])).flatten(0, 1))

    def broken(model, images):
        patches = real(model, images)
        patches[(images == to_tensor(IMAGES[5:])).flatten(1).all(dim=1)] = float("nan")
        return patches

    monkeypatch.setattr(nearest, "patch_features", broken)
    engine = nearest.NearestEngine(model, memory, slots=4)
    verdicts = {request.image_id: verdict for request, verdict in run(engine, requests_of(IMAGES))}
    assert isinstance(verdicts.pop("5"), NotFinite)
    assert sorted(verdicts) == list("01234")
    assert all(np.isfinite(verdict.score) for verdict in verdicts.values())


def requests_of(images):
    return [Request(str(number), image) for number, image in enumerate(images)]
