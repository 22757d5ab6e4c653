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
    memory, _ = nearest.remember(nearest.patch_features(model, to_tensor(IMAGES[:4])).flatten(0, 1))
    detections = list(nearest.detect_nearest(model, memory, [Request(str(i), image) for i, image in enumerate(IMAGES)]))
    patches = nearest.whiten(nearest.patch_features(model, to_tensor(IMAGES)), memory.whitening)
    for row, detection in enumerate(detections):
        expected = [min(float((patch - other).norm()) for other in memory.patches) for patch in patches[row]]
        np.testing.assert_allclose(detection.anomaly_map.ravel(), expected, atol=0.02)
        assert detection.stop_step is None
        assert detection.steps == []
    scores = [detection.score for detection in detections]
    assert min(scores[4:]) > 10 * max(scores[:4])  # which are remembered


def test_directions_in_which_good_patches_differ_weigh_less() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(500, 8, generator=generator) * torch.tensor([1.0] + [0.1] * 7) + 3
    memory, _ = nearest.remember(patches)
    spread = nearest.whiten(patches, memory.whitening)
    torch.testing.assert_close(spread.mean(dim=0), torch.zeros(8), atol=1e-3, rtol=0)
    deviations = torch.linalg.svdvals(spread) / 500**0.5
    assert deviations.max() / deviations.min() < 5  # ten before
    assert torch.cdist(memory.patches, spread).amin(dim=1).max() < 0.05  # float16


def test_features_that_never_vary_keep_their_distances() -> None:
    patches = torch.nn.functional.normalize(torch.ones(50, 8), dim=1)
    memory, _ = nearest.remember(patches)
    other = torch.nn.functional.normalize(torch.arange(8.0), dim=0)
    moved = nearest.whiten(other[None], memory.whitening) - memory.patches
    torch.testing.assert_close(moved.norm(dim=1).min(), (other - patches[0]).norm(), atol=1e-2, rtol=0)


def test_the_memory_covers_good_patches_better_than_a_random_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "REMEMBERED", 20)
    generator = torch.Generator().manual_seed(0)
    crowded = torch.randn(2000, 16, generator=generator) * 0.1
    rare = torch.randn(10, 16, generator=generator) * 3
    patches = torch.cat([crowded, rare])
    memory, rows = nearest.remember(patches)
    assert memory.patches.shape == (20, 16)
    spread = nearest.whiten(patches, memory.whitening)
    reach = torch.cdist(spread, memory.patches).amin(dim=1).max()
    blind = torch.cdist(spread, spread[torch.randperm(2010, generator=generator)[:20]]).amin(dim=1).max()
    assert reach < 0.5 * blind
    again, same = nearest.remember(patches)
    assert all(map(torch.equal, (*again, same), (*memory, rows)))
    torch.testing.assert_close(spread[rows], memory.patches, atol=0.01, rtol=0)  # float16


def test_an_image_without_finite_features_costs_only_itself(model, monkeypatch) -> None:
    real = nearest.patch_features
    memory, _ = nearest.remember(real(model, to_tensor(IMAGES[:4])).flatten(0, 1))

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
