"""The published settings for MVTec-AD, MPDD, VisA and PCB-Bank: `presets.json` holds the released code's values."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from glad_core.errors import GladError, did_you_mean

CATEGORY_FIELDS = ("start_step", "delta", "pixel_weight_v", "min_step")


@cache
def table() -> dict[str, Any]:
    """The whole table: settings that all share, those of every dataset, and T, δ, v and min_step of every category.

    ``dino_epoch`` is the epoch from which the adapted features were taken, 0 if they were not adapted.
    """
    return json.loads((Path(__file__).parent / "presets.json").read_text())


def preset(dataset: str, category: str, *, multi_class: bool = False) -> dict[str, Any]:
    """Published `Settings` fields of one category.

    Args:
        multi_class: those of the single model for all categories of the dataset. For its number of steps, noise index,
            direction and foreground there are no published values, so these are the category's own.

    Raises:
        GladError: unknown dataset or category; the message names the nearest known one.
    """
    known, chosen = _find(dataset, category)
    facts = table()
    settings = facts["scoring"] | {key: known[key] for key in ("inference_steps", "feature_resolution", "noise_index")}
    if multi_class:
        joint = facts["multi_class"]
        chosen = joint["datasets"][dataset]
        settings |= {key: joint[key] for key in ("resolution", "feature_resolution")}
    settings |= {key: chosen[key] for key in CATEGORY_FIELDS}
    mode = _foreground_mode(facts["scoring_foreground"], category)
    return {**settings, "bidirectional": category in facts["bidirectional"], "foreground_mode": mode}


def training_preset(dataset: str, category: str, *, multi_class: bool = False) -> dict[str, Any]:
    """Published `Recipe` fields of one category (the optimiser was an 8-bit AdamW).

    Args:
        multi_class: those of the single model for all categories; ``category`` then only chooses the foreground.

    Raises:
        GladError: unknown dataset or category; the message names the nearest known one.
    """
    _, chosen = _find(dataset, category)
    facts = table()
    if multi_class:
        chosen = facts["multi_class"]["datasets"][dataset]
    mode = _foreground_mode(facts["training_foreground"], category)
    return {**facts["training"], "steps": chosen["train_steps"], "foreground_mode": mode}


def _find(dataset: str, category: str) -> tuple[dict[str, Any], dict[str, Any]]:
    datasets = table()["datasets"]
    if dataset not in datasets:
        raise GladError(f"no published settings for dataset '{dataset}'{did_you_mean(dataset, datasets)}")
    categories = datasets[dataset]["categories"]
    if category not in categories:
        raise GladError(f"{dataset} has no category '{category}'{did_you_mean(category, categories)}")
    return datasets[dataset], categories[category]


def _foreground_mode(modes: dict[str, list[str]], category: str) -> int:
    return next((int(mode) for mode, names in modes.items() if category in names), 3)
