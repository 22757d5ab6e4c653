from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from cluster.storage import Storage
from glad_core.decoding.picture import ImageError
from glad_core.views import Framing
from pipelines.train.good_images import GoodImage
from pipelines.train.kept_frames import Kept, keep, read_frames

FRAMINGS = (Framing("squash", 16), Framing("tiles", 16, 2.0))
SIZES = [(20, 30)] * 4


@pytest.fixture
def images(tmp_path: Path) -> list[GoodImage]:
    for value in range(4):
        Image.fromarray(np.full((20, 30, 3), 50 * value, np.uint8)).save(tmp_path / f"{value}.png")
    return [GoodImage(str(tmp_path / f"{value}.png"), "nut") for value in range(4)]


def read(images: list[GoodImage], kept: Kept | None, framings: tuple[Framing, ...] = FRAMINGS) -> list[list[int]]:
    frames = list(read_frames(images, framings, Storage(), kept))
    assert [frame.size for frame in frames] == SIZES[: len(images)]
    assert {tuple(view.shape for view in frame.frames) for frame in frames} == {
        tuple((*framing.size(20, 30), 3) for framing in framings)
    }
    return [[int(view[0, 0, 0]) for view in frame.frames] for frame in frames]


def test_kept_pictures_are_decoded_once(images: list[GoodImage], ray_session) -> None:
    expected = read(images, None)
    assert expected == [[value, value] for value in (0, 50, 100, 150)]
    kept = keep(images, SIZES, FRAMINGS, Storage(), 10**6)
    assert kept.places.keys() == {image.uri for image in images}
    ray.wait(kept.objects, num_returns=len(kept.objects))
    for image in images[1:]:
        Path(image.uri).unlink()
    assert read(images, kept) == expected
    with pytest.raises(ImageError):  # seen otherwise, they are decoded
        read(images, kept, FRAMINGS[:1])


def test_what_is_not_at_hand_is_decoded(images: list[GoodImage], ray_session) -> None:
    """Beyond the bound; not ready; lost; unreadable when the task came, readable now."""
    one = sum(3 * np.prod(framing.size(20, 30)) for framing in FRAMINGS)
    kept = keep(images, SIZES, FRAMINGS, Storage(), int(2.5 * one))
    assert len(kept.places) == 2
    assert keep(images, SIZES, FRAMINGS, Storage(), 0).objects == []
    expected = read(images, None)
    assert read(images, kept) == expected

    @ray.remote(max_retries=0)
    def fails() -> None:
        raise OSError

    lost = fails.remote()
    ray.wait([lost])
    place = {images[0].uri: (0, 0)}
    for held in (lost, ray.put([None])):
        assert read(images, Kept(FRAMINGS, [held], place)) == expected
