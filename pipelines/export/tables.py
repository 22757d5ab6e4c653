"""`glad export --delta` and `--iceberg`: a finished run's own Parquet files as a table, none copied or changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as pads

from cluster.storage import Storage, is_s3
from glad_core.errors import GladError
from pipelines.runs.run import Run
from pipelines.runs.schema import RESULTS, RESULTS_SCHEMA

READERS = 8  # files whose number of rows is read at a time
NO_HALVES = "anomaly_map"  # its numbers have 16 bits, which Delta does not know


def delta(run: Run, results: pads.Dataset) -> str:
    """Write the log of a Delta table beside the results, `_delta_log`; return where the table is.

    Delta names files relative to its table, so that has to be the results' own folder. A log of an earlier state of the
    run, such as before it was overwritten, gets a new version with today's files.

    Raises:
        GladError: deltalake is missing, or cannot write there.
    """
    try:
        from deltalake import DeltaTable, Schema
        from deltalake.transaction import AddAction, create_table_with_add_actions
    except ImportError as error:
        raise GladError("--delta needs deltalake: pip install 'glad-ray[export]'") from error
    table, options = run.path(RESULTS), _delta_options(run.storage)
    root = results.filesystem.normalize_path(run.storage.resolve(table)[1])
    infos = results.filesystem.get_file_info(results.files)
    with ThreadPoolExecutor(READERS) as pool:
        rows = list(pool.map(lambda fragment: fragment.metadata.num_rows, results.get_fragments()))
    actions = [
        AddAction(
            path=info.path.removeprefix(f"{root}/"),
            size=info.size,
            partition_values={},
            modification_time=int(info.mtime_ns // 1_000_000),
            data_change=True,
            stats=json.dumps({"numRecords": number}),
        )
        for info, number in zip(infos, rows, strict=True)
    ]
    schema = Schema.from_arrow(pa.schema([field for field in RESULTS_SCHEMA if field.name != NO_HALVES]))
    with _in_one_line("Delta", table):
        if DeltaTable.is_deltatable(table, options):
            known = DeltaTable(table, storage_options=options).file_uris()
            if {unquote(file).rpartition("/")[2] for file in known} == {info.base_name for info in infos}:
                return table
        create_table_with_add_actions(
            table, schema, actions, mode="overwrite", partition_by=[], storage_options=options, name="glad results"
        )
    return table


def iceberg(run: Run, results: pads.Dataset, folder: str) -> str:
    """Write the metadata of an Iceberg table to ``folder``; return the file from which every engine opens it.

    Raises:
        GladError: pyiceberg is missing, or cannot write there.
    """
    try:
        from pyiceberg.catalog.sql import SqlCatalog
    except ImportError as error:
        raise GladError("--iceberg needs pyiceberg: pip install 'glad-ray[export]'") from error
    logging.getLogger("pyiceberg").setLevel(logging.ERROR)  # it warns of each column without statistics
    scheme = "s3://" if is_s3(run.location) else ""
    with _in_one_line("Iceberg", folder):
        # A catalog for this moment: the metadata file holds everything, and can be registered in a lasting one.
        catalog = SqlCatalog("glad", uri="sqlite:///:memory:", **_iceberg_options(run.storage))
        catalog.create_namespace("glad")
        table = catalog.create_table("glad.results", schema=RESULTS_SCHEMA, location=folder)
        table.add_files([scheme + file for file in results.files], check_duplicate_files=False)
        return table.metadata_location


@contextmanager
def _in_one_line(kind: str, location: str) -> Iterator[None]:
    """Errors of the libraries, which have no class in common, as ours."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise GladError(f"{location}: not written as a table of {kind}: {reason}") from error


def _delta_options(storage: Storage) -> dict[str, str]:
    options = {
        "AWS_ENDPOINT_URL": storage.endpoint,
        "AWS_ACCESS_KEY_ID": storage.access_key,
        "AWS_SECRET_ACCESS_KEY": storage.secret_key,
        "AWS_SESSION_TOKEN": storage.session_token,
        "AWS_REGION": storage.region,
        "AWS_ALLOW_HTTP": "true" if (storage.endpoint or "").startswith("http://") else None,
    }
    return {name: value for name, value in options.items() if value}


def _iceberg_options(storage: Storage) -> dict[str, Any]:
    options = {
        "s3.endpoint": storage.endpoint,
        "s3.access-key-id": storage.access_key,
        "s3.secret-access-key": storage.secret_key,
        "s3.session-token": storage.session_token,
        "s3.region": storage.region,
    }
    return {name: value for name, value in options.items() if value}
