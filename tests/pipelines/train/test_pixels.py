from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive.picture import ImageError
from pipelines.train.good_images import GoodImage
from pipelines.train.pixels import load_textures, read_picture, read_pixels

STORAGE = Storage()


def draw(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)
    return path


def test_pixels_come_in_the_order_of_the_images(tmp_path: Path) -> None:
    images = [GoodImage(str(draw(tmp_path / f"{value}.png", value)), "nut") for value in (9, 3, 200, 7)]
    pixels = read_pixels(images, 16, STORAGE)
    assert [array.shape for array in pixels] == [(16, 16, 3)] * 4
    assert [int(array[0, 0, 0]) for array in pixels] == [9, 3, 200, 7]


def test_a_process_decodes_an_image_once(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", 5)
    first = read_picture(STORAGE, str(path), 8)
    assert (first.width, first.height) == (30, 20)
    path.unlink()
    assert read_picture(STORAGE, str(path), 8) is first
    with pytest.raises(ImageError):
        read_picture(STORAGE, str(path), 16)


def test_textures_are_the_first_readable_images_below_a_folder(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        draw(tmp_path / "wood" / f"{value}.png", value)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.png").write_text("no image")
    textures = load_textures(str(tmp_path), 8, STORAGE)
    assert textures.shape == (3, 8, 8, 3)
    assert sorted(textures[:, 0, 0, 0].tolist()) == [1, 2, 3]
    assert len(load_textures(str(tmp_path), 8, STORAGE, limit=2)) == 2
    with pytest.raises(GladError, match="no texture images"):
        load_textures(str(tmp_path / "texts"), 8, STORAGE)
