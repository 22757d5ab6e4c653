"""The published settings of MVTec-AD, MPDD, VisA and PCB-Bank, as data (`presets.json`; facts of the released code)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from glad_core.errors import GladError, did_you_mean


@cache
def table() -> dict[str, Any]:
    """The whole table: per dataset its steps and resolution, per category T, δ, v, min_step and training steps."""
    return json.loads((Path(__file__).parent / "presets.json").read_text())


def preset(dataset: str, category: str) -> dict[str, Any]:
    """Published `Settings` fields of one category.

    Raises:
        GladError: unknown dataset or category; the line names the nearest known one.
    """
    facts = table()
    if dataset not in facts["datasets"]:
        raise GladError(f"no published settings for dataset '{dataset}'{did_you_mean(dataset, facts['datasets'])}")
    known = facts["datasets"][dataset]
    if category not in known["categories"]:
        raise GladError(f"{dataset} has no category '{category}'{did_you_mean(category, known['categories'])}")
    chosen = dict(known["categories"][category])
    del chosen["train_steps"]
    shared = {key: known[key] for key in ("inference_steps", "feature_resolution", "noise_index")}
    mode = next((int(mode) for mode, names in facts["scoring_foreground"].items() if category in names), 3)
    return {**shared, **chosen, "bidirectional": category in facts["bidirectional"], "foreground_mode": mode}
