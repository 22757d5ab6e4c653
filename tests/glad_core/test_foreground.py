import pytest
import torch

from glad_core import foreground


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_the_split_of_least_variance_within(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dark = 60 + 20 * torch.randn(300, generator=generator)
    bright = 170 + 30 * torch.randn(100 + 200 * seed, generator=generator)
    grey = torch.cat([dark, bright]).round().clamp(0, 255)
    values = grey.double().numpy()

    def within(level: int) -> float:
        parts = values[values <= level], values[values > level]
        return sum(len(part) * part.var() for part in parts)

    candidates = range(int(values.min()), int(values.max()))
    best = min(within(level) for level in candidates)
    assert within(int(foreground.otsu(grey.view(1, -1)))) == pytest.approx(best, rel=1e-9)


def test_foreground_modes() -> None:
    images = torch.full((2, 3, 32, 32), 0.7)
    images[:, :, 8:20, 10:24] = -0.6  # a dark object on bright ground
    object_BHW = (images[:, 0] < 0).bool()
    assert torch.equal(foreground.foreground(images, 1), object_BHW)
    assert torch.equal(foreground.foreground(-images, 2), object_BHW)
    assert foreground.foreground(images, 3).all()


def test_object_mask_is_wider_than_the_object_and_soft() -> None:
    images = torch.full((1, 3, 160, 160), 0.7)
    images[:, :, 70:90, 70:90] = -0.6
    mask = foreground.object_mask(images, 1)[0]
    assert mask.shape == (160, 160)
    assert 0 <= mask.min() <= mask.max() <= 1 + 1e-6
    assert mask[60:100, 60:100].min() > 0.98  # the object and well around it
    assert mask[80, 46] == pytest.approx(0.5, abs=0.1)  # 24 pixels (4 sigma) beside it the soft edge has its middle
    assert mask[80, 10] == 0
    assert foreground.object_mask(images, 3) == pytest.approx(1, abs=1e-5)
