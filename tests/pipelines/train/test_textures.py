from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.train.textures import load_textures

STORAGE = Storage()


def draw(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)
    return path


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
