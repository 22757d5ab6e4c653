"""Locations: local paths, file:// and s3:// URIs, and how each is spelled."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote_to_bytes

from cluster.storage_errors import StorageError

QUOTED_S3 = "s3+url://"  # an S3 location with %XX in its key; s3:// takes a percent sign as itself
SCHEME = re.compile(r"[A-Za-z0-9+.-]*://")
# What a line of text, or a Parquet string, cannot hold or would not return unchanged.
UNSPEAKABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|^\\s|\\s$")


def is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", QUOTED_S3))


def local_path(uri: str) -> str:
    """A local path or file:// URI as an absolute path, ``~`` expanded. A URI may hold any byte as %XX.

    Raises:
        StorageError: another kind of URI, one of another machine, or no path at all.
    """
    scheme = SCHEME.match(uri)
    if (scheme and scheme.group() != "file://") or re.match("s3:|file:/?[^/]", uri):
        raise StorageError(f"{uri}: unknown kind of location; use a local path, file:// or s3://")
    path = uri
    if scheme:
        host, slash, _ = uri.removeprefix("file://").partition("/")
        if host not in ("", "localhost") or not slash:
            raise StorageError(f"{uri}: a path on this machine begins with a slash; write file:///PATH")
        path = os.fsdecode(unquote_to_bytes(os.fsencode(uri.removeprefix("file://").removeprefix(host))))
    if not path or "\0" in path:
        raise StorageError(f"{uri!r}: no path; it is empty or holds a zero byte")
    return os.path.abspath(os.path.expanduser(path))


def absolute(location: str) -> str:
    """A location from a user in its one spelling: absolute, without a slash at its end.

    Raises:
        StorageError: neither a local path nor file:// or s3://, or s3:// without a bucket.
    """
    if not is_s3(location):
        return local_path(location)
    try:
        if location.startswith(QUOTED_S3):
            path = unquote_to_bytes(location.removeprefix(QUOTED_S3)).decode()
        else:
            path = location.removeprefix("s3://").encode().decode()
    except UnicodeError as error:
        raise StorageError(f"{location!r}: keys on S3 are UTF-8") from error
    path = path.strip("/")
    if not path:
        raise StorageError(f"{location}: names no bucket; write s3://BUCKET/PREFIX")
    if "\0" in path:
        raise StorageError(f"{location!r}: no path; it is empty or holds a zero byte")
    return f"s3://{path}"


def spelled(location: str) -> str:
    """An absolute location as one line of UTF-8, from which `absolute` makes the same location.

    That is the location itself, if possible. A name that is not UTF-8, or holds control characters or white space at
    its end, needs a URI with %XX in it.
    """
    if (location.isprintable() and location[-1:] != " ") or not UNSPEAKABLE.search(location):
        return location
    if is_s3(location):
        return QUOTED_S3 + quote(location.removeprefix("s3://"))
    return "file://" + quote(os.fsencode(location))


def join(uri: str, *parts: str) -> str:
    """``uri`` with names added; works for local paths and S3 alike."""
    return "/".join([uri.rstrip("/") or "/", *parts]).replace("//", "/", 1 if uri == "/" else 0)
