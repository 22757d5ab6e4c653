"""The file of `glad retrain --settings`: options of single categories. And the recipe that options of training make.

categories:
  screw:
    preset: MVTec-AD/screw
    precision: bf16
  grid: {steps: 3000, learning-rate: 2e-6, base: s3://models/grid-base}
"""

from __future__ import annotations

from typing import Any, get_args

import typer

from glad_core.bundle import presets
from glad_core.bundle.settings import Kind, View
from glad_core.errors import GladError, did_you_mean
from pipelines.cli import config_file

# Options of training as the recipe names them.
RECIPE = {
    "steps": "steps",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "micro_batch": "micro_batch",
    "precision": "autocast",
    "gradient_checkpointing": "gradient_checkpointing",
    "optimizer": "optimizer",
    "ema": "ema_decay",
    "seed": "seed",
}
FIELDS = ("base", "part", "textures", "target_fpr")  # of a `TrainRequest`, beside its recipe
VIEWS = ("views", "scale", "overlap")
PRESET = "preset"  # a key that is no option: DATASET/CATEGORY of the published recipes


def recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Recipe fields from options of `glad train` or `glad retrain`; None for what the base bundle decides."""
    fields = {field: options.get(option) for option, field in RECIPE.items()}
    return fields | {"anomaly_probability": 0.0 if options.get("anomalies") is False else None}


def views(kinds: str | None, scale: float | None, overlap: float | None) -> tuple[View, ...] | None:
    """The views that the options name; None to have them chosen.

    Raises:
        GladError: an unknown or repeated view, or a scale or overlap without tiles.
    """
    if kinds is None:
        if scale is None and overlap is None:
            return None
        raise GladError("--scale and --overlap belong to tiles: add --views tiles, or --views squash,tiles")
    names = [name.strip() for name in kinds.split(",")]
    for name in names:
        if name not in get_args(Kind):
            raise GladError(f"--views: there is no '{name}'{did_you_mean(name, get_args(Kind))}")
    if len(set(names)) < len(names):
        raise GladError(f"--views {kinds}: each only once")
    if "tiles" not in names and (scale is not None or overlap is not None):
        raise GladError(f"--scale and --overlap belong to tiles, which --views {kinds} has not")
    wished = {name: value for name, value in (("scale", scale), ("overlap", overlap)) if value is not None}
    return tuple(View.parse({"kind": name, **(wished if name == "tiles" else {})}, "--views") for name in names)


def read(location: str, ctx: typer.Context) -> dict[str, dict[str, Any]]:
    """Fields of a `TrainRequest` by category; their ``recipe`` holds only what the file names.

    Raises:
        GladError: no such file, no YAML, an unknown key (with the nearest known one), or a wrong value.
        StorageError: storage cannot be used.
    """
    from cluster.storage import Storage  # here: `glad --help` need not import pyarrow

    try:
        text = Storage.from_environment().read(location)
    except FileNotFoundError as error:
        raise GladError(f"{location}: no such file; name a YAML file with a table of categories") from error
    content = config_file.parse(text, location)
    for key in content:
        if key != "categories":
            raise GladError(f"{location}: unknown key '{key}'{did_you_mean(str(key), ['categories'])}")
    tables = content.get("categories")
    if not isinstance(tables, dict):
        raise GladError(f"{location}: 'categories' has to be a table of categories and their options")
    return {str(name): _fields(options, ctx, f"{location}: {name}") for name, options in tables.items()}


def _fields(content: Any, ctx: typer.Context, place: str) -> dict[str, Any]:
    if not isinstance(content, dict | None):
        raise GladError(f"{place}: has to be a table of options and values")
    allowed = {*RECIPE, *FIELDS, *VIEWS, "anomalies"}
    known = {config_file.key_of(option): option for option in ctx.command.params if option.name in allowed}
    values: dict[str, Any] = {}
    published: dict[str, Any] = {}
    for name, value in (content or {}).items():
        key = str(name).replace("_", "-")
        if key == PRESET:
            published = _published(value, f"{place}.{PRESET}")
        elif key not in known:
            raise GladError(f"{place}: unknown key '{name}'{did_you_mean(key, [*known, PRESET])}")
        elif value is not None:
            values[known[key].name] = config_file.check(value, known[key], ctx, f"{place}.{name}")
    if published and values.get("part", ctx.params["part"]) != "unet":
        raise GladError(f"{place}: '{PRESET}' is a recipe of the unet; leave it out, or part")
    named = {field: value for field, value in recipe(values).items() if value is not None}
    fields = {name: values[name] for name in FIELDS if name in values} | {"recipe": published | named}
    if any(name in values for name in VIEWS):
        fields["views"] = views(*(values.get(name) for name in VIEWS))
    return fields


def _published(value: Any, place: str) -> dict[str, Any]:
    dataset, slash, category = str(value).partition("/")
    if not slash:
        raise GladError(f"{place}: '{value}' is not DATASET/CATEGORY, such as MVTec-AD/screw")
    try:
        return presets.training_preset(dataset, category)
    except GladError as error:
        raise GladError(f"{place}: {error}") from error
