"""Names of images: how the URI of a tar's member is spelled, and the id of an image."""

from __future__ import annotations

import hashlib
import os
from urllib.parse import quote, unquote_to_bytes

from cluster.locations import QUOTED_S3, UNSPEAKABLE, absolute

LONGEST = 1000  # characters of a name that is only shown
QUOTED_TAR = "tar+url://"  # as tar://, with %XX in the member's name


def image_id(path: str, member: str | None = None) -> str:
    """The id of an image by its path within the archive; different images have different ids.

    Args:
        member: the image's name in the tar file ``path``.
    """
    if member is None:
        name = path if "::" not in path else f"::file:{path}"
    elif "::" in f"{path}:" or "::" in f":{member}":  # a path like a.tar::x.png may be that of a file
        name = f"::tar:{len(os.fsencode(path))}:{path}{member}"
    else:
        name = f"{path}::{member}"
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def tar_uri(member: str, file: str) -> str:
    """The URI of an image in the tar ``file``, a spelled location. `split_tar_uri` takes it apart again."""
    if "::" in f"{member}:" or UNSPEAKABLE.search(member):
        return f"{QUOTED_TAR}{quote(os.fsencode(member))}::{file}"
    return f"tar://{member}::{file}"


def split_tar_uri(uri: str) -> tuple[str, str] | None:
    """Member and tar file of a URI, None if it names no member of a tar."""
    member, found, file = uri.removeprefix(QUOTED_TAR).removeprefix("tar://").partition("::")
    if not found or not uri.startswith((QUOTED_TAR, "tar://")):
        return None
    if uri.startswith(QUOTED_TAR):
        member = os.fsdecode(unquote_to_bytes(member))
    return member, file


def page_id(file: str, page: int) -> str:
    """The id of a page, not the first, of the image with the id ``file``; `Run.manifest_rows` takes it apart again."""
    return f"{file}-{page}"


def page_uri(uri: str, page: int) -> str:
    """The URI of a page, not the first, of the image with that URI."""
    return f"{uri}#page={page}"


def path_of(uri: str) -> str:
    """The path that an image's URI ends with, nothing quoted in it: of a file its location, in a tar its member."""
    parts = split_tar_uri(uri)
    if parts is not None:
        return parts[0]
    return absolute(uri) if uri.startswith(("file://", QUOTED_S3)) else uri


def printable(text: str) -> str:
    """Text for a Parquet string; bytes that are not UTF-8 are escaped."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def one_line(entry: str) -> str:
    """What a list names and storage cannot, as one line of UTF-8 that is not too long to be shown."""
    text = quote(os.fsencode(entry), safe="/:") if UNSPEAKABLE.search(entry) else entry
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
