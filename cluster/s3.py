"""S3 by three clients, as no one of them does it all: pyarrow reads and writes, botocore lists page by page (pyarrow's
listing arrives as a whole), and s3fs writes only where there is nothing yet (pyarrow cannot send If-None-Match)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import pyarrow.fs as pafs

if TYPE_CHECKING:
    from cluster.storage import Storage


@lru_cache(maxsize=8)
def filesystem(storage: Storage) -> pafs.S3FileSystem:
    """What reads and writes."""
    options: dict[str, Any] = {
        "connect_timeout": 5,
        "request_timeout": 60,
        "check_directory_existence_before_creation": False,
        # Waits double from 25 ms on: after an outage of any length at most as long again is lost. (The SDK's standard
        # strategy draws its waits at random and gives up early when many requests fail at once.)
        "retry_strategy": pafs.AwsDefaultS3RetryStrategy(max_attempts=storage.attempts),
    }
    if storage.access_key:
        options |= {"access_key": storage.access_key, "secret_key": storage.secret_key or ""}
        if storage.session_token:
            options["session_token"] = storage.session_token
    if storage.region or storage.endpoint:
        options["region"] = storage.region or "us-east-1"
    if storage.endpoint:
        endpoint = urlparse(storage.endpoint if "://" in storage.endpoint else f"http://{storage.endpoint}")
        options |= {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc}
    return pafs.S3FileSystem(**options)


def keys(storage: Storage, bucket: str, prefix: str, delimiter: str = "") -> Iterator[tuple[str, Any]]:
    """Objects below a prefix as (rest of the key, size), page by page.

    With a delimiter a folder's objects are one entry, of size None.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    below = f"{prefix}/" if prefix else ""
    try:
        pages = _listing(storage).get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=below, Delimiter=delimiter):
            found = [(item["Key"], item["Size"]) for item in page.get("Contents", []) if not item["Key"].endswith("/")]
            if delimiter:  # the server has put the two kinds of this page apart
                folders = [(item["Prefix"], None) for item in page.get("CommonPrefixes", [])]
                found = sorted(found + folders, key=lambda entry: entry[0].encode())
            for key, size in found:
                yield key[len(below) :].removesuffix(delimiter or "/"), size
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error


@lru_cache(maxsize=8)
def _listing(storage: Storage) -> Any:
    import botocore.session
    from botocore.config import Config

    return botocore.session.get_session().create_client(
        "s3",
        region_name=storage.region or ("us-east-1" if storage.endpoint else None),
        endpoint_url=storage.endpoint,
        aws_access_key_id=storage.access_key,
        aws_secret_access_key=storage.secret_key,
        aws_session_token=storage.session_token,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": storage.attempts},
            connect_timeout=5,
            s3={"addressing_style": "path"} if storage.endpoint else {},
        ),
    )


def create(storage: Storage, path: str, data: bytes) -> None:
    """Write an object only if there is none. Raises FileExistsError, or OSError as the server answers."""
    from botocore.exceptions import BotoCoreError

    try:
        _creating(storage).pipe_file(path, data, mode="create")
    except BotoCoreError as error:  # what s3fs does not make an OSError of: no connection, no credentials
        raise OSError(str(error)) from error


@lru_cache(maxsize=8)
def _creating(storage: Storage) -> Any:
    import s3fs

    return s3fs.S3FileSystem(
        key=storage.access_key,
        secret=storage.secret_key,
        token=storage.session_token,
        endpoint_url=storage.endpoint,
        config_kwargs={"retries": {"mode": "standard", "max_attempts": storage.attempts}},
        client_kwargs={"region_name": storage.region or "us-east-1"} if storage.endpoint else {},
    )
