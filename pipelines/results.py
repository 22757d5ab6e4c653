"""What a run leaves in DEST: results/, errors/, manifest/ (Parquet) and run.json, which comes last.

results/*.parquet has one row per judged image (`RESULTS_SCHEMA`), errors/*.parquet one per image that was not judged;
started.json is made exclusively when a run claims DEST; run.json says by its presence that the run is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import Storage, StorageError, join
from glad_core.errors import GladError
from glad_core.settings import Settings

RESULTS, ERRORS, MANIFEST, STARTED, COMPLETE = "results", "errors", "manifest", "started.json", "run.json"
MEMORY = "memory.safetensors"  # of a run with the nearest-neighbour method

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
# What the scoring stage puts out: a result or an error in every row.
SCORED_SCHEMA = pa.schema(
    [*RESULTS_SCHEMA, *(ERRORS_SCHEMA.field(name) for name in ("stage", "error_type", "message"))]
)
COUNTS_SCHEMA = pa.schema([("scored", pa.int64()), ("anomalies", pa.int64()), ("errors", pa.int64())])


def claim(dest: str, storage: Storage, overwrite: bool) -> None:
    """Make DEST this run's own, or refuse; also the proof that it can be written.

    Raises:
        GladError: another run's results, finished or not, are there.
        StorageError: not writable, no such bucket, wrong credentials.
    """
    if storage.kind(dest) == "file":
        raise StorageError(f"{dest}: a file is in the way; choose another folder")
    taken = [name for name in (COMPLETE, STARTED) if storage.kind(join(dest, name)) == "file"]
    taken += [name for name in (RESULTS, ERRORS, MANIFEST) if storage.kind(join(dest, name)) == "folder"]
    if taken and not overwrite:
        what = "another run's results" if COMPLETE in taken else "an unfinished run"
        raise GladError(f"{dest} already holds {what} ({taken[0]}): choose another --out or give --overwrite")
    if taken:
        release(dest, storage)
    try:
        mine = storage.create(join(dest, STARTED), b"{}\n")
    except StorageError as error:
        raise StorageError(f"{dest} cannot be written; choose another --out ({error})") from error
    if not mine:
        raise GladError(f"{dest}: another run has just started writing there; choose another --out")


def release(dest: str, storage: Storage) -> None:
    """Remove what runs write, and nothing else that may be in DEST; the claim goes last."""
    storage.delete_file(join(dest, COMPLETE))
    for name in (RESULTS, ERRORS, MANIFEST):
        storage.delete_folder(join(dest, name))
    storage.delete_file(join(dest, MEMORY))
    storage.delete_file(join(dest, STARTED))


def write_results(storage: Storage, dest: str) -> Callable[[pa.Table], pa.Table]:
    """A stage: `SCORED_SCHEMA` rows in, their files written, one row of counts out.

    A file is named after the images in it, so a task that is retried replaces its own file instead of adding one.
    """

    def stage(rows: pa.Table) -> pa.Table:
        failed = pc.is_valid(rows["error_type"])
        results = rows.filter(pc.invert(failed)).select(RESULTS_SCHEMA.names).cast(RESULTS_SCHEMA)
        errors = rows.filter(failed).select(ERRORS_SCHEMA.names).cast(ERRORS_SCHEMA)
        for name, table in ((RESULTS, results), (ERRORS, errors)):
            if len(table):
                _write_part(storage, join(dest, name), table)
        anomalies = pc.sum(results["is_anomalous"]).as_py() or 0
        return pa.table(
            {"scored": [len(results)], "anomalies": [anomalies], "errors": [len(errors)]}, schema=COUNTS_SCHEMA
        )

    return stage


def complete(dest: str, storage: Storage, run: dict[str, Any]) -> None:
    """Close a run: a reader finds both datasets even if one has no rows; run.json comes last."""
    for name, schema, count in ((RESULTS, RESULTS_SCHEMA, "scored"), (ERRORS, ERRORS_SCHEMA, "errors")):
        if run["counts"][count] == 0:
            _write_part(storage, join(dest, name), schema.empty_table())
    storage.write(join(dest, COMPLETE), (json.dumps(run, indent=1) + "\n").encode())


def read_run(dest: str, storage: Storage) -> dict[str, Any]:
    """run.json of a finished run.

    Raises:
        GladError: no finished run there.
    """
    if storage.kind(join(dest, COMPLETE)) != "file":
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


def _write_part(storage: Storage, folder: str, table: pa.Table) -> None:
    ids = "\n".join(sorted(table["image_id"].to_pylist()))
    name = f"part-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.parquet"
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    storage.write(join(folder, name), stream.getvalue())
