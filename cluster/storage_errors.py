"""Errors of storage in one line each, whether from a disk or from S3, and what they are about: file or connection."""

from __future__ import annotations

import errno


class StorageError(Exception):
    """Storage cannot do what was requested. The message is one line: what failed, where, and the way out."""


class UnorderedError(StorageError):
    """A server lists keys in another order than S3, or not from the key on that was requested."""


class ChangedError(OSError):
    """The file is there, but no longer with the bytes that were listed."""


# Of a disk, a network share or this process, not of the one file that was asked for. (Some systems lack some.)
TROUBLE_NAMES = (
    "EIO ENXIO ENODEV EBUSY EAGAIN EINTR ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH "
    "ECONNRESET ECONNREFUSED ECONNABORTED EPIPE ESHUTDOWN EREMOTEIO ECOMM ENOLINK EPROTO ENOKEY EKEYEXPIRED "
    "EKEYREJECTED EMFILE ENFILE ENOMEM ENOBUFS"
)
TROUBLE = frozenset(getattr(errno, name) for name in TROUBLE_NAMES.split() if hasattr(errno, name))

CREDENTIAL_WORDS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "InvalidAccessKeyId",
    "InvalidToken",
    "EXPIRED_TOKEN",
    "ExpiredToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "SignatureDoesNotMatch",
    "SIGNATURE_DOES_NOT_MATCH",
    "Forbidden",
    "AccessDenied",
    "HTTP response code 403",
    "occurred (403)",
    "occurred (401)",
    "Unable to locate credentials",
    "No credentials",
    "retrieving credentials",
    "Partial credentials",
)
CLOCK_WORDS = ("RequestTimeTooSkewed", "REQUEST_TIME_TOO_SKEWED")
BUCKET_WORDS = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")
BUSY_WORDS = (
    "SLOW_DOWN",
    "SlowDown",
    "Throttl",
    "TooManyRequests",
    "RequestTimeout",
    "RequestLimitExceeded",
    "SERVICE_UNAVAILABLE",
    "ServiceUnavailable",
    "HTTP status 503",
    "InternalError",
    "INTERNAL_FAILURE",
    *(f"occurred ({status})" for status in (429, 500, 502, 503, 504)),
)
NETWORK_WORDS = (
    *("NETWORK_CONNECTION", "Couldn't connect", "Could not connect", "curlCode", "Connection refused"),
    *("Connect timeout", "Read timeout", "Connection was closed", "response stream", "total bytes expected"),
    *("Failed to connect to proxy", "SSL validation failed"),
)
CERTIFICATE_WORDS = (
    "CERTIFICATE_VERIFY_FAILED",
    "X509",
    "doesn't match",
    "curlCode: 60",
    "curlCode: 77",
    "SSL peer cert",
)


def explain(uri: str, endpoint: str | None, error: OSError) -> str:
    """One line for an OSError about ``uri``: what happened and what to do.

    Args:
        endpoint: URL of the S3 server; None for AWS itself.
    """
    text = " ".join(str(error).split())
    if uri.startswith("s3://") and (reason := _s3_reason(uri, endpoint or "AWS", text, error)):
        return f"{uri}: {reason}"
    if is_disk_full(error):
        return f"{uri}: no space left on that disk; make room and give the same command again"
    if isinstance(error, FileNotFoundError):
        return f"{uri}: no such file or folder"
    if isinstance(error, PermissionError):
        return f"{uri}: permission denied; choose a location you may read and write"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{uri}: a file is in the way; choose another folder"
    if isinstance(error, IsADirectoryError):
        return f"{uri}: a folder is in the way; name a file"
    if error.errno in TROUBLE:
        return f"{uri}: {error.strerror}; give the same command again when that disk or this machine works"
    return f"{uri}: {text}"


def _s3_reason(uri: str, endpoint: str, text: str, error: OSError) -> str | None:
    bucket = uri.removeprefix("s3://").split("/")[0]
    if _mentions(text, BUCKET_WORDS):
        return f"no bucket '{bucket}' at {endpoint}; create it or correct the name"
    if _mentions(text, CLOCK_WORDS):
        return f"{endpoint} refused the time of the request; set the clock of this machine, or the server's"
    if _mentions(text, CREDENTIAL_WORDS) or isinstance(error, PermissionError):
        return (
            f"{endpoint} refused the credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
            f"and the rights on bucket '{bucket}'"
        )
    if _mentions(text, CERTIFICATE_WORDS):
        return (
            f"{endpoint} has a certificate that this machine does not trust; set AWS_CA_BUNDLE to the file with the "
            "certificate of its authority, and check its dates and the host that it names"
        )
    if _mentions(text, NETWORK_WORDS):
        return f"cannot reach {endpoint}; check AWS_ENDPOINT_URL and the network"
    if _mentions(text, BUSY_WORDS):
        return f"{endpoint} is overloaded or down; give the same command again when it answers ({text[:200]})"
    return None


def is_trouble(error: BaseException) -> bool:
    """Whether the connection, the disk or this process may be at fault and not the file, so that it is tried again.

    A `PermissionError` may be either: rights on one file, or the credentials.
    """
    if isinstance(error, ChangedError | FileNotFoundError | NotADirectoryError):
        return False
    return isinstance(error, OSError) and (
        isinstance(error, ConnectionError | PermissionError | TimeoutError) or error.errno in TROUBLE
    )


def is_disk_full(error: OSError) -> bool:
    """Whether a local disk or quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _mentions(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)
