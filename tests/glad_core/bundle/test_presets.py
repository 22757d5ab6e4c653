import json
import os
from pathlib import Path

import pytest

from glad_core.bundle import presets
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from glad_core.training.recipe import Recipe

PUBLISHED = Path(os.environ.get("GLAD_SHARED", Path(__file__).parents[3] / "../shared")) / "published_settings.json"
CATEGORIES = [
    (name, category) for name, known in presets.table()["datasets"].items() for category in known["categories"]
]


@pytest.fixture(scope="module")
def published() -> dict:
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is not there; name its folder with GLAD_SHARED")
    return json.loads(PUBLISHED.read_text())


def test_counts() -> None:
    counts = {name: len(dataset["categories"]) for name, dataset in presets.table()["datasets"].items()}
    assert counts == {"MVTec-AD": 15, "MPDD": 6, "VisA": 12, "PCB-Bank": 7}


@pytest.mark.parametrize("multi_class", [False, True])
def test_every_category_makes_valid_settings_and_recipes(multi_class: bool) -> None:
    for dataset, category in CATEGORIES:
        Settings(**presets.preset(dataset, category, multi_class=multi_class))
        Recipe(**presets.training_preset(dataset, category, multi_class=multi_class))


def test_same_categories_as_published(published: dict) -> None:
    facts = published["single_class"]
    assert set(CATEGORIES) == {(name, category) for name in facts for category in facts[name]["categories"]}


def test_settings_are_the_published_ones(published: dict) -> None:
    common, modes = published["common"], published["foreground_mode"]["scoring"]
    shared = ("guidance_scale", "step_score_top_k", "image_score_top_k", "blur_sigma", "resolution")
    for dataset, category in CATEGORIES:
        facts = published["single_class"][dataset]
        expected = {key: common[key] for key in shared}
        expected |= {key: facts[key] for key in ("inference_steps", "feature_resolution", "noise_index")}
        expected |= {key: facts["categories"][category][key] for key in presets.CATEGORY_FIELDS}
        expected["bidirectional"] = category in published["bidirectional_map"]
        expected["foreground_mode"] = mode_of(modes, category)
        assert presets.preset(dataset, category) == expected | {"variant": "official"}, (dataset, category)


def test_multi_class_settings_are_the_published_ones(published: dict) -> None:
    facts = published["multi_class"]
    for dataset, category in CATEGORIES:
        joint = facts[dataset]
        expected = presets.preset(dataset, category) | {
            "resolution": facts["resolution"],
            "feature_resolution": facts["feature_resolution"],
            "start_step": joint["start_step"],
            "delta": joint["delta"],
            "min_step": joint["min_step"],
            "pixel_weight_v": joint["v"],
        }
        assert presets.preset(dataset, category, multi_class=True) == expected, (dataset, category)
        steps = presets.training_preset(dataset, category, multi_class=True)["steps"]
        assert steps == joint.get("train_steps", facts["train_steps"])
        assert presets.table()["multi_class"]["datasets"][dataset].get("adapted") == joint.get("adapted")


def test_training_facts_are_the_published_ones(published: dict) -> None:
    common, modes = published["common"], published["foreground_mode"]["training"]
    shared = ("batch_size", "learning_rate", "lr_schedule", "max_grad_norm", "anomaly_probability")
    assert common["optimizer"].endswith("weight decay 1e-2")
    for dataset, category in CATEGORIES:
        facts = published["single_class"][dataset]
        expected = {key: common[key] for key in shared} | {"weight_decay": 1e-2, "autocast": common["mixed_precision"]}
        expected["steps"] = facts["categories"][category]["train_steps"]
        expected["foreground_mode"] = mode_of(modes, category)
        assert presets.training_preset(dataset, category) == expected, (dataset, category)
        known = presets.table()["datasets"][dataset]
        assert known["categories"][category]["dino_epoch"] == facts["categories"][category]["dino_epoch"]
        assert known.get("adapted") == facts.get("adapted")


def mode_of(modes: dict, category: str) -> int:
    return 1 if category in modes["1"] else 2 if category in modes["2"] else 3


@pytest.mark.parametrize("look_up", [presets.preset, presets.training_preset])
def test_unknown_name_names_the_nearest(look_up) -> None:
    with pytest.raises(GladError, match="did you mean 'screw'"):
        look_up("MVTec-AD", "scrw")
    with pytest.raises(GladError, match="did you mean 'MVTec-AD'"):
        look_up("MVTecAD", "screw")


def test_a_preset_is_the_callers_own() -> None:
    presets.preset("VisA", "candle")["delta"] = 9
    assert presets.preset("VisA", "candle")["delta"] == 0.45
