from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import IMAGES, make_batches

from cluster.storage import Storage
from glad_core.training.recipe import Recipe
from glad_core.views import Framing
from pipelines.train.batches import batches
from pipelines.train.good_images import GoodImage

RECIPE = Recipe(steps=3, batch_size=4, anomaly_probability=1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[GoodImage]:
    folder = tmp_path_factory.mktemp("good")
    for number, pixels in enumerate(IMAGES):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [GoodImage(str(folder / f"{number}.png"), "nut") for number in range(len(IMAGES))]


def take(images: list[GoodImage], textures: Path | None = None, **options) -> list[dict[str, torch.Tensor]]:
    folder = None if textures is None else str(textures)
    return list(batches(images, RECIPE, "unet", (Framing("squash", 32),), Storage(), folder, **options))


def test_workers_share_the_batches_of_one(images, ray_session) -> None:
    expected = list(make_batches(RECIPE))
    whole = take(images, first_step=0)
    shares = [take(images, first_step=0, rank=rank, world=2) for rank in (0, 1)]
    assert len(whole) == len(shares[0]) == len(shares[1]) == RECIPE.steps
    for step, batch in enumerate(expected):
        for name, values in batch.items():
            assert torch.equal(whole[step][name], values), name
            assert torch.equal(torch.cat([share[step][name] for share in shares]), values), name


def test_a_resumed_run_gets_the_remaining_batches(images, ray_session) -> None:
    (last,) = take(images, first_step=2)
    *_, expected = make_batches(RECIPE)
    assert all(torch.equal(last[name], values) for name, values in expected.items())
    assert take(images, first_step=3) == []


def test_textures_come_into_the_anomalies(images, tmp_path: Path, ray_session) -> None:
    Image.fromarray(np.full((32, 32, 3), (255, 0, 255), np.uint8)).save(tmp_path / "t.png")
    plain, textured = take(images, first_step=2), take(images, tmp_path, first_step=2)
    assert torch.equal(plain[0]["mask"], textured[0]["mask"])
    assert not torch.equal(plain[0]["image"], textured[0]["image"])
