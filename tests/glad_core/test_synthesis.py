import numpy as np
import pytest
import torch

from glad_core import synthesis


def pictures(count: int, height: int = 40, width: int = 52) -> torch.Tensor:
    """Smooth colour fields with a little noise, uint8 [B, H, W, 3]."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand((count, 3, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noisy = (smooth + 0.05 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)
    return (noisy * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("with_pool", [False, True])
def test_a_result_depends_on_its_own_seed_alone(with_pool: bool) -> None:
    images, seeds = pictures(6), [11, 12, 13, 14, 15, 16]
    pool = pictures(3, 24, 24) if with_pool else None
    torch.manual_seed(1)
    together, masks = synthesis.synthesize(images, seeds=seeds, textures=pool, probability=1.0)
    torch.manual_seed(2)  # the global generator must not matter
    order = [4, 0, 2]
    apart, masks_apart = synthesis.synthesize(
        images[order], seeds=[seeds[row] for row in order], textures=pool, probability=1.0
    )
    assert torch.equal(apart, together[order])
    assert torch.equal(masks_apart, masks[order])
    other, _ = synthesis.synthesize(images[:1], seeds=[99], textures=pool, probability=1.0)
    assert not torch.equal(other, together[:1])


@pytest.mark.parametrize("size", [(40, 52), (33, 50), (64, 64), (9, 12)])
def test_masks_say_where_something_changed(size: tuple[int, int]) -> None:
    images = pictures(24, *size)
    before = images.clone()
    anomalous, masks = synthesis.synthesize(images, seeds=range(24), probability=1.0)
    assert torch.equal(images, before), "the good images must stay as they are"
    assert anomalous.shape == images.shape
    assert masks.shape == (24, *size)
    assert anomalous.dtype == torch.uint8
    assert masks.dtype == torch.bool
    assert masks.flatten(1).any(dim=1).all(), "every chosen image gets an anomaly"
    changed = (anomalous != images).any(dim=3)
    assert not (changed & ~masks).any(), "nothing changes outside its mask"
    assert (changed & masks).sum() > 0.9 * masks.sum()
    assert 0.02 < masks.float().mean() < 0.4


def test_half_of_the_images_stay_good_with_empty_masks() -> None:
    images = pictures(200, 16, 16)
    anomalous, masks = synthesis.synthesize(images, seeds=range(200))
    chosen = masks.flatten(1).any(dim=1)
    assert 70 <= chosen.sum() <= 130
    assert torch.equal(anomalous[~chosen], images[~chosen])


def test_opacity_is_the_share_of_the_image_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A white texture on a black image shows as 1 - β, β uniform in [0, 0.8]; half of the images shuffle themselves."""
    monkeypatch.setattr(synthesis, "_recoloured", lambda colours, generator: colours)
    images, pool = torch.zeros(300, 16, 16, 3, dtype=torch.uint8), torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    anomalous, _ = synthesis.synthesize(images, seeds=range(300), textures=pool, probability=1.0)
    brightest = anomalous.flatten(1).amax(dim=1) / 255
    shown = brightest[brightest > 0]
    assert 0.4 < len(shown) / 300 < 0.6
    assert 0.2 - 1 / 255 <= shown.min() < 0.25
    assert 0.95 < shown.max() <= 1
    assert shown.mean() == pytest.approx(0.6, abs=0.06)


def test_anomalies_stay_on_the_foreground() -> None:
    images = pictures(20)
    allowed = torch.zeros(20, 40, 52, dtype=torch.bool)
    allowed[:, 10:30, 12:40] = True
    anomalous, masks = synthesis.synthesize(images, seeds=range(20), foreground_BHW=allowed, probability=1.0)
    assert not masks[~allowed].any()
    assert masks.flatten(1).any(dim=1).sum() >= 18  # bounded redraws: nearly all
    assert torch.equal(anomalous[~allowed], images[~allowed])
    nowhere = torch.zeros_like(allowed)
    unchanged, empty = synthesis.synthesize(images, seeds=range(20), foreground_BHW=nowhere, probability=1.0)
    assert torch.equal(unchanged, images)
    assert not empty.any()


def test_an_empty_mask_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    images, allowed = pictures(40), torch.zeros(40, 40, 52, dtype=torch.bool)
    allowed[:, 20:22, 20:22] = True  # so small that most first draws miss it

    def hits() -> int:
        _, masks = synthesis.synthesize(images, seeds=range(40), foreground_BHW=allowed, probability=1.0)
        return int(masks.flatten(1).any(dim=1).sum())

    redrawn = hits()
    monkeypatch.setattr(synthesis, "MASK_TRIES", 1)
    assert hits() < 25 < 32 <= redrawn


def test_the_field_is_turned_about_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    angle = 2 * np.pi * float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    y, x = synthesis._turned(torch.arange(9)[:, None], torch.arange(13)[None], 9, 13, generator)
    assert (int(y[4, 6]), int(x[4, 6])) == (4, 6)
    for row, column in [(0, 0), (8, 12), (2, 11)]:
        turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [row - 4, column - 6]
        assert [int(y[row, column]), int(x[row, column])] == [round(turned[0] + 4), round(turned[1] + 6)]


def test_one_seed_per_image() -> None:
    with pytest.raises(ValueError, match="zip"):
        synthesis.synthesize(pictures(3), seeds=[1, 2])


@pytest.mark.parametrize(("size", "cells"), [((33, 50), (4, 8)), ((64, 64), (32, 1)), ((5, 7), (32, 32))])
def test_perlin_against_one_pixel_at_a_time(size: tuple[int, int], cells: tuple[int, int]) -> None:
    field = synthesis.perlin(size, cells, torch.Generator().manual_seed(5))
    angles = 2 * np.pi * torch.rand((cells[0] + 1, cells[1] + 1), generator=torch.Generator().manual_seed(5)).numpy()

    def fade(f: float) -> float:
        return 6 * f**5 - 15 * f**4 + 10 * f**3

    for y, x in [(0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3), (3, 5)]:
        v, u = (y + 0.5) * cells[0] / size[0], (x + 0.5) * cells[1] / size[1]
        row, column = int(v), int(u)
        value = 0.0
        for down in (0, 1):
            for right in (0, 1):
                angle, dy, dx = angles[row + down, column + right], v - row - down, u - column - right
                weight = fade(1 - abs(dy)) * fade(1 - abs(dx))
                value += weight * (np.cos(angle) * dy + np.sin(angle) * dx)
        assert float(field[y, x]) == pytest.approx(2**0.5 * value, abs=1e-4)
    assert field.shape == size
    assert field.abs().max() <= 1 + 1e-5


def test_structure_shuffle_moves_whole_pieces() -> None:
    image = torch.arange(16 * 24, dtype=torch.int64).view(16, 24, 1).expand(-1, -1, 3)
    y, x = (part.flatten() for part in torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij"))
    shuffled = synthesis._shuffled_structure(image, y, x, torch.Generator().manual_seed(0)).view(16, 24, 3)

    def pieces(picture: torch.Tensor) -> set[tuple[int, ...]]:
        return {
            tuple(picture[y : y + 2, x : x + 3].flatten().tolist()) for y in range(0, 16, 2) for x in range(0, 24, 3)
        }

    assert pieces(shuffled) == pieces(image)
    assert not torch.equal(shuffled, image)


def test_recolouring_treats_pixels_one_by_one_and_keeps_their_number() -> None:
    colours = pictures(1).view(-1, 3)
    for seed in range(12):
        changed = synthesis._recoloured(colours, torch.Generator().manual_seed(seed))
        order = torch.randperm(len(colours), generator=torch.Generator().manual_seed(seed))
        again = synthesis._recoloured(colours[order], torch.Generator().manual_seed(seed))
        assert changed.shape == colours.shape
        assert changed.dtype == torch.uint8
        assert torch.equal(again, changed[order])
