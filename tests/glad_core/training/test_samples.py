import numpy as np
from tiny_training import IMAGES, RECIPE

from glad_core.training import samples
from glad_core.training.recipe import Recipe
from glad_core.views import random_tile


def test_every_image_is_seen_once_an_epoch() -> None:
    order = [samples.sample_at(RECIPE, position, 10) for position in range(20)]
    indices = [sample.index for sample in order]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]
    assert len({sample.anomaly_seed for sample in order} | {sample.noise_seed for sample in order}) == 40


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """So any process may make any part of a batch."""
    recipe = Recipe(batch_size=6, anomaly_probability=1.0)
    chosen = [samples.sample_at(recipe, position, len(IMAGES)) for position in range(6)]
    images = [IMAGES[sample.index] for sample in chosen]
    whole = samples.make_rows(images, chosen, recipe, "unet")
    parts = [samples.make_rows(images[part], chosen[part], recipe, "unet") for part in (slice(0, 2), slice(2, 6))]
    for name, values in whole.items():
        assert np.array_equal(values, np.concatenate([part[name] for part in parts])), name
    assert whole["mask"].any()
    assert not np.array_equal(whole["image"], np.stack(images))


def test_only_the_unet_s_rows_have_anomalies() -> None:
    chosen = [samples.sample_at(RECIPE, position, len(IMAGES)) for position in range(4)]
    images = [IMAGES[sample.index] for sample in chosen]
    for part in ("dino", "vae"):
        rows = samples.make_rows(images, chosen, RECIPE, part)
        assert rows.keys() == {"index", "seed", "image"}
        assert np.array_equal(rows["image"], np.stack(images))


def test_seeds_differ_by_part_and_fit_a_generator() -> None:
    assert samples.derived_seed(1, "anomaly", 2) == samples.derived_seed(1, "anomaly", 2)
    assert samples.derived_seed(1, "anomaly", 2) != samples.derived_seed(1, "noise", 2)
    assert 0 <= samples.derived_seed("prompt", "ü") < 2**63


def test_every_place_of_every_view_can_become_a_tile_and_a_seed_gives_the_same():
    frames = [np.zeros((8, 8, 3), np.uint8), np.arange(12 * 20 * 3).reshape(12, 20, 3).astype(np.uint16)]
    found = {}
    for seed in range(2000):
        tile = random_tile(frames, 8, seed)
        assert tile.shape == (8, 8, 3)
        found.setdefault(int(tile[0, 0, 0]) if tile.any() else -1, seed)
    assert len(found) == 1 + 5 * 13
    assert all((random_tile(frames, 8, seed) == random_tile(frames, 8, seed)).all() for seed in found.values())
