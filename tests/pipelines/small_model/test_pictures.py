from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="needs the extra 'small-model'")

from pipelines.small_model.pictures import batches, make_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool.npz", boards=4, photos=20, textures=4)


def test_a_pool_is_drawn_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "work" / "pool.npz"
    drawn = make_pool(path, boards=1, photos=2, textures=1)
    assert {kind: values.shape[0] for kind, values in drawn.items()} == {"boards": 1, "photos": 2, "textures": 1}
    monkeypatch.setattr("pipelines.small_model.pictures.package_photos", lambda: pytest.fail("drawn again"))
    read = make_pool(path)
    assert all(np.array_equal(drawn[kind], read[kind]) for kind in drawn)


def test_batches_repeat_and_stay_in_range(pool: dict[str, np.ndarray]) -> None:
    first = next(batches(pool, 8, 64, seed=3))
    assert torch.equal(first, next(batches(pool, 8, 64, seed=3)))
    assert first.shape == (8, 3, 64, 64)
    assert first.abs().max() <= 1
