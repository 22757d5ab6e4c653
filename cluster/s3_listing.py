"""What a bucket holds: keys in S3's order, whole or by ranges, and single objects as a listing shows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster import s3
from cluster.storage_errors import UnorderedError


def keys(
    connection: s3.Connection,
    bucket: str,
    prefix: str,
    delimiter: str = "",
    after: str | None = None,
    last: str | None = None,
) -> Iterator[tuple[str, Any, Any]]:
    """Objects below a prefix as (rest of the key, size, ETag), page by page.

    With a delimiter, a folder's objects are one entry without size and ETag.

    Args:
        after: only keys after this one (the rest of it, as they are returned), whether it exists or not.
        last: only keys up to this one.

    Raises:
        OSError: as the server answers.
        UnorderedError: the server does not list the keys of a range in order, so that some could be lost.
    """
    below = f"{prefix}/" if prefix else ""
    start = {} if after is None else {"StartAfter": below + after}
    in_range = after is not None or last is not None
    previous = after
    try:
        pages = s3.client(connection).get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=below, Delimiter=delimiter, **start):
            objects = page.get("Contents", [])
            entries = [(item["Key"][len(below) :], item["Size"], item.get("ETag")) for item in objects]
            if delimiter:  # the server lists objects and folders of a page apart
                folders = [(item["Prefix"][len(below) :], None, None) for item in page.get("CommonPrefixes", [])]
                entries = sorted(entries + folders, key=lambda entry: entry[0].encode())
            for name, size, version in entries:
                if in_range and previous is not None and name <= previous:  # code points sort as UTF-8 does
                    raise UnorderedError(f"s3://{bucket}/{below}{name}: listed after {previous}")
                if last is not None and name > last:
                    if previous != last:
                        _check_order(connection, bucket, prefix, previous, last)
                    return
                previous = name
                if size is None:
                    yield name.removesuffix(delimiter), size, version
                elif size or (name and not name.endswith("/")):  # else a mark that a folder is there
                    yield name, size, version
    except s3.failures() as error:
        raise OSError(str(error)) from error


def _check_order(connection: s3.Connection, bucket: str, prefix: str, previous: str | None, last: str) -> None:
    """Make sure that what comes after ``previous`` comes after ``last``, which is no key any more, as well.

    A server that sorts otherwise could still have keys of this range to list. A key written at this moment also makes
    a difference, so it compares more than once.
    """
    for _ in range(3):
        key = next_key(connection, bucket, prefix, previous)
        if key == next_key(connection, bucket, prefix, last) or (key is not None and key <= last):
            return  # in order, or written just now
    raise UnorderedError(f"s3://{bucket}/{prefix}: not listed in order around {last}")


def next_key(connection: s3.Connection, bucket: str, prefix: str, after: str | None) -> str | None:
    """The first key below a prefix, without the prefix, that comes after ``after``; None if there is none.

    Raises:
        OSError: as the server answers.
        UnorderedError: the answer does not come after ``after``.
    """
    below = f"{prefix}/" if prefix else ""
    start = {} if after is None else {"StartAfter": below + after}
    try:
        page = s3.client(connection).list_objects_v2(Bucket=bucket, Prefix=below, MaxKeys=1, **start)
    except s3.failures() as error:
        raise OSError(str(error)) from error
    for item in page.get("Contents", []):
        key: str = item["Key"][len(below) :]
        if after is not None and key <= after:
            raise UnorderedError(f"s3://{bucket}/{below}{key}: listed after {after}")
        return key
    return None


def find(connection: s3.Connection, bucket: str, key: str) -> tuple[int, str | None]:
    """Size and ETag of an object.

    Raises:
        OSError: as the server answers; FileNotFoundError if there is none.
    """
    try:
        page = s3.client(connection).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    except s3.failures() as error:
        raise s3.by_kind(connection, error) from error
    for item in page.get("Contents", []):  # the key itself is the first that begins with it
        if item["Key"] == key:
            return item["Size"], item.get("ETag")
    raise FileNotFoundError(f"s3://{bucket}/{key}: no such file")
