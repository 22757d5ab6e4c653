"""Errors of storage in one line each, whether from a disk or from S3."""

from __future__ import annotations

import errno


class StorageError(Exception):
    """Storage cannot do what was requested. The message is one line: what failed, where, and the way out."""


CREDENTIAL_WORDS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "SIGNATURE_DOES_NOT_MATCH",
    "Forbidden",
    "AccessDenied",
    "HTTP response code 403",
    "Unable to locate credentials",
    "No credentials",
)
BUCKET_WORDS = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")
BUSY_WORDS = ("SLOW_DOWN", "SlowDown", "SERVICE_UNAVAILABLE", "ServiceUnavailable", "HTTP status 503")
# libcurl's codes for: host not found, no connection, no answer in time. Other codes may concern a single object.
UNREACHABLE_WORDS = ("curlCode: 6,", "curlCode: 7,", "curlCode: 28,")
NETWORK_WORDS = ("NETWORK_CONNECTION", "Couldn't connect", "Could not connect", "curlCode", "Connection refused")


def explain(uri: str, endpoint: str | None, error: OSError) -> str:
    """One line for an OSError about ``uri``: what happened and what to do.

    Args:
        endpoint: URL of the S3 server; None for AWS itself.
    """
    text = " ".join(str(error).split())
    if uri.startswith("s3://") and (reason := _s3_reason(uri, endpoint or "AWS", text)):
        return f"{uri}: {reason}"
    if is_disk_full(error):
        return f"{uri}: no space left on that disk; make room and give the same command again"
    if isinstance(error, FileNotFoundError):
        return f"{uri}: no such file or folder"
    if isinstance(error, PermissionError):
        return f"{uri}: permission denied; choose a location you may read and write"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{uri}: a file is in the way; choose another folder"
    return f"{uri}: {text}"


def _s3_reason(uri: str, endpoint: str, text: str) -> str | None:
    bucket = uri.removeprefix("s3://").split("/")[0]
    if _mentions(text, BUCKET_WORDS):
        return f"no bucket '{bucket}' at {endpoint}; create it or correct the name"
    if _mentions(text, CREDENTIAL_WORDS):
        return (
            f"{endpoint} refused the credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
            f"and the rights on bucket '{bucket}'"
        )
    if _mentions(text, NETWORK_WORDS):
        return f"cannot reach {endpoint}; check AWS_ENDPOINT_URL and the network"
    if _mentions(text, BUSY_WORDS):
        return f"{endpoint} is overloaded or down; give the same command again when it answers"
    return None


def is_outage(error: OSError) -> bool:
    """Whether the server did not answer at all, so that the requested file is not to blame."""
    return _mentions(str(error), UNREACHABLE_WORDS + BUSY_WORDS)


def is_disk_full(error: OSError) -> bool:
    """Whether a local disk or quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _mentions(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)
