import numpy as np
import pytest

from glad_core.drawn_anomalies import draw_anomalies

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(60, 200, (64, 64, 3), dtype=np.uint8) for _ in range(24)]


def test_every_image_gets_one_anomaly_in_its_place() -> None:
    changed, masks = draw_anomalies(IMAGES, seeds=range(24))
    assert masks.shape == (24, 64, 64)
    for before, after, mask in zip(IMAGES, changed, masks, strict=True):
        assert after.dtype == np.uint8
        assert 0 < mask.mean() < 0.25
        different = (before != after).any(axis=2)
        assert different[mask].mean() > 0.8
        # Soft edges reach a few pixels farther.
        assert different.mean() < mask.mean() + 0.1


def test_an_anomaly_depends_on_its_seed_and_image_alone() -> None:
    together, _ = draw_anomalies(IMAGES, seeds=range(24))
    (alone,), _ = draw_anomalies(IMAGES[7:8], seeds=[7])
    assert np.array_equal(together[7], alone)
    (other,), _ = draw_anomalies(IMAGES[7:8], seeds=[8])
    assert not np.array_equal(other, alone)
    with pytest.raises(ValueError, match="shorter"):
        draw_anomalies(IMAGES, seeds=[1])


def test_a_grey_picture_stays_grey() -> None:
    grey = [np.repeat(image[..., :1], 3, axis=2) for image in IMAGES]
    changed, _ = draw_anomalies(grey, seeds=range(24))
    assert all(np.ptp(image, axis=2).max() == 0 for image in changed)


def test_it_lies_on_the_foreground() -> None:
    foreground = np.zeros((24, 64, 64), bool)
    foreground[:, 40:44, 10:14] = True
    _, masks = draw_anomalies(IMAGES, seeds=range(24), foreground_BRR=foreground)
    assert masks[:, 30:54, :24].any(axis=(1, 2)).all()
    nothing = draw_anomalies(IMAGES, seeds=range(24), foreground_BRR=np.zeros_like(foreground))
    assert nothing[1].any(axis=(1, 2)).all()


def test_black_and_white_pictures_show_it_too() -> None:
    for level in (0, 255):
        flat = [np.full((64, 64, 3), level, np.uint8)] * 24
        changed, _ = draw_anomalies(flat, seeds=range(24))
        # A smear, or a part from elsewhere, of a flat picture is nothing.
        assert 6 <= sum((image != level).any() for image in changed) < 24
