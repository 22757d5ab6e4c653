"""Names and Parquet schemas of what a run folder holds; docs/results-schema.md explains the columns to users."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from cluster.storage import Storage, join
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError

RESULTS, ERRORS, MANIFEST = "results", "errors", "manifest"
STARTED, PLAN, COMMITS, COMPLETE = "started.json", "plan.json", "commits", "run.json"
MEMORY = "memory.safetensors"  # good patches, in a run with --method nearest

RESULTS_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("category", pa.string()),
        ("model_id", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
        ("is_anomalous", pa.bool_()),
        ("stop_step", pa.int16()),
        ("stop_reason", pa.string()),
        ("steps", pa.list_(pa.struct([("timestep", pa.int16()), ("score", pa.float32())]))),
        ("anomaly_map", pa.list_(pa.float16())),  # rows of map_height x map_width, flattened
        ("map_height", pa.int32()),
        ("map_width", pa.int32()),
        ("reconstruction", pa.binary()),  # PNG
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seconds", pa.float32()),
    ]
)
ERRORS_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("stage", pa.string()),  # list, fetch, decode or score
        ("error_type", pa.string()),
        ("message", pa.string()),
    ]
)
# Output of the scoring stage: a result or an error in every row, and the image's position in the manifest.
SCORED_SCHEMA = pa.schema(
    [
        *RESULTS_SCHEMA,
        *(ERRORS_SCHEMA.field(name) for name in ("stage", "error_type", "message")),
        ("position", pa.int64()),
    ]
)
# Output of the writing stage: a row for each shard that it wrote images of (`commits.Written`).
WRITTEN_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("scored", pa.int64()),
        ("anomalies", pa.int64()),
        ("errors", pa.int64()),
        ("files", pa.list_(pa.string())),
    ]
)


def read_run(dest: str, storage: Storage) -> dict[str, Any]:
    """run.json of a finished run.

    Raises:
        GladError: no finished run there.
    """
    if storage.kind(join(dest, COMPLETE)) != "file":
        if storage.kind(join(dest, STARTED)) == "file":
            raise GladError(f"{dest}: this run is not finished; its `glad score` command, given again, goes on with it")
        raise GladError(f"{dest}: no finished run there (no {COMPLETE}); name the --out of a `glad score`")
    try:
        run = json.loads(storage.read(join(dest, COMPLETE)))
        return {"models": {}, "counts": {}} | run
    except (ValueError, TypeError) as error:
        raise GladError(f"{join(dest, COMPLETE)}: damaged; score again") from error


def settings_of(run: dict[str, Any], category: str, where: str) -> Settings:
    """The settings an image of this category was scored with, from run.json.

    Raises:
        GladError: run.json does not say.
    """
    model = run["models"].get("", run["models"].get(category))
    if model is None:
        raise GladError(f"{where}: names no model for category '{category}'; score again")
    return Settings.parse(model["settings"], where)
