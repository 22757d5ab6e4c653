"""Names and Parquet schemas of what a run folder holds; docs/results-schema.md explains the columns to users."""

from __future__ import annotations

import re

import pyarrow as pa

RESULTS, ERRORS, MANIFEST = "results", "errors", "manifest"
# Of `plan` and `record` each generation of the folder has its own (`pipelines.runs.claim.numbered`).
PLAN, COMMITS, STAGING, RECORD, COMPLETE = "plan", "commits", "staging", "record", "run.json"
# Our files in results/ and errors/, and the generation in their names; versions before 0.2 gave them none.
FILE = re.compile(rf"(?:{RESULTS}|{ERRORS})/(?:[^/]+/)?part-(?:\d{{8}}-(\d{{1,7}})-[0-9a-f]{{16}}|[^/]*)\.parquet")

TILE = pa.struct(
    [
        ("view", pa.string()),
        *((name, pa.int32()) for name in ("top", "left", "height", "width")),  # in pixels of the picture
        ("score", pa.float32()),
        ("stop_step", pa.int16()),
        ("stop_reason", pa.string()),
    ]
)
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
        ("full_height", pa.int32()),  # of the map at full size; null in results of before 0.2: D x D
        ("full_width", pa.int32()),
        ("reconstruction", pa.binary()),  # PNG
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seconds", pa.float32()),
        ("tiles", pa.list_(TILE)),
        ("doubt", pa.string()),
        ("p_value", pa.float32()),  # null in results of before schema version 3
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
        ("further", pa.bool_()),  # not the first page of its file
        ("shard_pages", pa.int64()),  # rows of its shard that are
        ("unjudged", pa.int64()),  # of its file's first page: pages that get no row
    ]
)
# Output of the writing stage: a row for each shard that it wrote images of (`commits.Written`).
WRITTEN_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("scored", pa.int64()),
        ("anomalies", pa.int64()),
        ("errors", pa.int64()),
        ("doubtful", pa.int64()),
        ("pages", pa.int64()),
        ("shard_pages", pa.int64()),
        ("unjudged", pa.int64()),
        ("staged", pa.string()),
        ("files", pa.list_(pa.string())),
        ("sizes", pa.list_(pa.int64())),
    ]
)
