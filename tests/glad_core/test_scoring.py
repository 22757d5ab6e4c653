import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2 import functional as TF

from glad_core import scoring
from glad_core.bundle.settings import Settings


def cosine_distances(query: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return 1 - torch.nn.functional.cosine_similarity(query[:, :, None], reference[:, None], dim=-1)


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_nearest_distance_is_the_minimum_over_all_positions(rows: int) -> None:
    query, reference = torch.randn(2, 25, 8), torch.randn(2, 25, 8)
    expected = cosine_distances(query, reference).amin(dim=2)
    torch.testing.assert_close(scoring.token_distance(query, reference, rows=rows), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_window_distance_is_the_minimum_nearby(radius: int) -> None:
    side = 5
    query, reference = torch.randn(2, side**2, 8), torch.randn(2, side**2, 8)
    distances = cosine_distances(query, reference)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    far = (places[:, None] - places[None]).abs().amax(dim=-1) > radius
    expected = distances.masked_fill(far, 2.0).amin(dim=2)
    result = scoring.token_distance(query, reference, match="window", radius=radius, rows=7)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_a_part_with_a_twin_elsewhere_is_seen_by_the_aligned_match_only() -> None:
    test, rebuilt = torch.eye(9)[None].repeat(1, 1, 1), torch.eye(9)[None].clone()
    test[0, 4] = test[0, 0]  # the part at 4 is gone; what is there now also exists at 0
    anywhere = scoring.token_map([test], [rebuilt], match="anywhere", radius=0, bidirectional=False)
    aligned = scoring.token_map([test], [rebuilt], match="window", radius=0, bidirectional=False)
    both = scoring.token_map([test], [rebuilt], match="sum", radius=0, bidirectional=False)
    assert anywhere.max() < 1e-6
    assert aligned[0, 1, 1] == pytest.approx(1)
    assert torch.equal(both, anywhere + aligned)
    assert scoring.token_map([test], [rebuilt], match="anywhere", radius=0, bidirectional=True)[0, 1, 1] > 0.9


def test_pixel_distance_per_image_does_not_depend_on_neighbours() -> None:
    maps, distance = torch.rand(3, 6, 6), torch.rand(3, 6, 6)
    together = scoring.add_pixel_distance(maps, distance, 2.0, scope="image")
    alone = scoring.add_pixel_distance(maps[1:2], distance[1:2], 2.0, scope="image")
    assert torch.equal(together[1:2], alone)
    batch = scoring.add_pixel_distance(maps, distance, 2.0, scope="batch")
    torch.testing.assert_close(batch, maps + 2 * maps.max() / distance.max() * distance)


def test_image_score_is_the_mean_of_the_largest_pixels() -> None:
    maps = torch.arange(16.0).view(1, 4, 4)
    assert scoring.image_score(maps, 3).item() == 14
    assert scoring.image_score(maps, 250).item() == pytest.approx(7.5)
    assert torch.equal(scoring.smooth(maps, 0), maps)


def test_float16_on_a_cpu_has_the_bits_of_the_float16_product():
    query, reference = torch.randn(2, 2, 64, 96, generator=torch.Generator().manual_seed(0)).half()
    unit = [tokens / tokens.norm(dim=-1, keepdim=True) for tokens in (query, reference)]
    plain = (1 - unit[0] @ unit[1].transpose(1, 2)).amin(dim=2)
    result = scoring.token_distance(query, reference)
    assert result.dtype == torch.float16
    assert torch.equal(result, plain)


@pytest.mark.parametrize("sigma", [0.0, 2.0, 6.0])
def test_a_map_is_resized_and_blurred_as_by_torchvision_and_scored_band_by_band_alike(sigma, monkeypatch):
    settings = Settings(feature_resolution=64, resolution=64, blur_sigma=sigma, image_score_top_k=50)
    tokens = torch.rand(9, 31, generator=torch.Generator().manual_seed(0))
    whole = scoring.full_size_map(tokens[None], settings, (72, 248))
    score = scoring.score_of_map(tokens.numpy(), settings, (72, 248))
    resized = scoring.resize_map(tokens[None], (72, 248))
    blurred = TF.gaussian_blur(resized, [2 * int(4 * sigma + 0.5) + 1] * 2, [sigma] * 2) if sigma else resized
    torch.testing.assert_close(whole, blurred, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(scoring, "LARGE", 1000)
    assert scoring.score_of_map(tokens.numpy(), settings, (72, 248)) == pytest.approx(score, abs=1e-5)
    assert score == pytest.approx(float(scoring.image_score(whole, 50)))


@pytest.mark.parametrize("size", [(72, 248), (24, 9), (1, 60), (60, 1), (2, 3), (1, 1)])
def test_maps_of_strips_and_small_pictures_are_smoothed_too(size, monkeypatch):
    """As SciPy's filter does, whose border `mirror` is the reflection, repeated."""
    values = np.random.default_rng(0).random(size)
    expected = gaussian_filter(values, 6.0, mode="mirror", truncate=4.0)
    found = scoring.smooth(torch.from_numpy(values)[None], 6.0)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    settings = Settings(feature_resolution=64, resolution=64, blur_sigma=6.0, image_score_top_k=50)
    tokens = torch.from_numpy(values).float()
    score = scoring.score_of_map(tokens.numpy(), settings, size)
    monkeypatch.setattr(scoring, "LARGE", 0)
    assert scoring.score_of_map(tokens.numpy(), settings, size) == pytest.approx(score, abs=1e-5)
