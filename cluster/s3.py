"""The S3 back end of `cluster.storage`. Three clients share the work, since none does it all: pyarrow streams, botocore
reads and writes whole objects (pyarrow hides why a request failed) and lists page by page (pyarrow returns a listing as
a whole), and s3fs writes only if there is no such object yet (pyarrow cannot send If-None-Match)."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlparse

import pyarrow.fs as pafs

from cluster.local import Listed
from cluster.storage_errors import ChangedError, StorageError

ATTEMPTS, PATIENT_ATTEMPTS = 3, 12  # per request to S3; with doubling waits, twelve outlast 50 seconds
READ_TIMEOUT = 20  # seconds without a byte
POOL = 16  # connections of a process that are kept open
NO_KEY = ("NoSuchKey", "404", "NotFound")
COPY_CHUNK = 8 * 2**20  # bytes per request and in memory while a file is copied


@dataclass(frozen=True)
class Connection:
    """How to reach an S3 server. The secrets stay out of the repr, hence out of logs.

    Attributes:
        endpoint: URL of the server; None for AWS itself.
        access_key: with ``secret_key`` and ``session_token`` the credentials; None for those of the machine.
        region: None for the machine's.
        attempts: of one request before it fails.
    """

    endpoint: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    ca_bundle: str | None = None  # file with the certificates of an authority of one's own
    anonymous: bool = False
    requester_pays: bool = False
    attempts: int = ATTEMPTS

    @classmethod
    def from_environment(cls) -> Self:
        """Read AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and others.

        The others are AWS_CA_BUNDLE (as botocore and the AWS CLI read it), AWS_NO_SIGN_REQUEST and AWS_REQUEST_PAYER
        (as GDAL reads them).

        A missing setting falls back to the AWS default chain on the machine that connects.
        """
        env = os.environ.get
        return cls(
            endpoint=env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or None,
            access_key=env("AWS_ACCESS_KEY_ID") or None,
            secret_key=env("AWS_SECRET_ACCESS_KEY") or None,
            session_token=env("AWS_SESSION_TOKEN") or None,
            region=env("AWS_REGION") or env("AWS_DEFAULT_REGION") or None,
            ca_bundle=env("AWS_CA_BUNDLE") or None,
            anonymous=(env("AWS_NO_SIGN_REQUEST") or "").lower() in ("1", "true", "yes"),
            requester_pays=(env("AWS_REQUEST_PAYER") or "").lower() == "requester",
        )

    def patient(self) -> Self:
        """The same for a running job: it waits most of a minute for a server that is gone or overloaded.

        Before a job runs, a wrong endpoint is the likelier reason, and the user should hear of it soon.
        """
        return replace(self, attempts=PATIENT_ATTEMPTS)


@lru_cache(maxsize=8)
def filesystem(connection: Connection, background_writes: bool = True) -> pafs.FileSystem:
    """Reads and writes objects. Writes in the background are faster, but a slow server leaves them all in memory."""
    if connection.requester_pays:  # pyarrow cannot send the header that agrees to it
        return pafs.PyFileSystem(pafs.FSSpecHandler(_creating(connection)))
    options: dict[str, Any] = {
        "connect_timeout": 5,
        "request_timeout": 60,
        "background_writes": background_writes,
        "check_directory_existence_before_creation": False,
        "allow_delayed_open": True,  # else three requests write a small object
        # Waits double from 25 ms on: after an outage of any length at most as long again is lost. (The SDK's standard
        # strategy draws its waits at random and gives up early when many requests fail at once.) They are not drawn, so
        # what hundreds of processes do at a time, reading and writing whole objects, goes through botocore.
        "retry_strategy": pafs.AwsDefaultS3RetryStrategy(max_attempts=connection.attempts),
    }
    if authority := _authority(connection):
        options["tls_ca_file_path"] = authority
    if connection.anonymous:
        options["anonymous"] = True
    elif connection.access_key:
        options |= {"access_key": connection.access_key, "secret_key": connection.secret_key or ""}
        if connection.session_token:
            options["session_token"] = connection.session_token
    if connection.region or connection.endpoint:
        options["region"] = connection.region or "us-east-1"
    if connection.endpoint:
        endpoint = urlparse(connection.endpoint if "://" in connection.endpoint else f"http://{connection.endpoint}")
        options |= {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc}
    return pafs.S3FileSystem(**options)


# Answers about one object alone, whatever the state of the connection: archived, named impossibly, not that long.
ABOUT_THE_OBJECT = {"InvalidObjectState", "KeyTooLongError", "MethodNotAllowed", "InvalidRange"}
# Answers that refuse the credentials or the moment with a status that otherwise refuses a request.
ABOUT_THE_CONNECTION = {
    *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("RequestTimeTooSkewed", "RequestTimeout", "AuthorizationHeaderMalformed", "NoSuchBucket", "SlowDown"),
    *("RequestExpired", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"),
}


def read(connection: Connection, path: str, offset: int, size: int | None, listed: Listed, most: int | None) -> bytes:
    """See `cluster.storage.Storage.read`; one attempt. An answer is of one version, which its ETag names."""
    listed = listed._replace(version=_etag(listed.version))
    bucket, _, key = path.partition("/")
    wanted = {} if size is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
    if size == 0:
        return b""
    try:
        answer = client(replace(connection, attempts=1)).get_object(Bucket=bucket, Key=key, **wanted)
        with answer["Body"] as body:
            length, total = answer["ContentLength"], answer.get("ContentRange", "").rpartition("/")[2]
            listed.check(f"s3://{path}", int(total) if total.isdigit() else length, _etag(answer.get("ETag")))
            if most is not None and length > most:
                raise OSError(errno.EFBIG, f"{length} bytes")
            if size is not None and length > size:
                raise ConnectionError(f"the server answers a range of {size} bytes with {length}")
            data: bytes = body.read()
    except failures() as error:
        raise by_kind(connection, error) from error
    if size is not None and len(data) < size:
        raise ChangedError(f"s3://{path}: {len(data)} bytes at {offset}, {size} were listed")
    return data


def write(connection: Connection, path: str, data: bytes) -> None:
    """Write an object whole, in one request; one attempt.

    Raises:
        OSError: as for `read`.
    """
    bucket, _, key = path.partition("/")
    try:
        client(replace(connection, attempts=1)).put_object(Bucket=bucket, Key=key, Body=data)
    except failures() as error:
        raise by_kind(connection, error) from error


def _etag(value: str | None) -> str | None:
    """An ETag without its quotes; a proxy that compresses marks it as weak."""
    return value and value.removeprefix("W/").strip('"')


def failures() -> tuple[type[Exception], ...]:
    """All exceptions that botocore lets through."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return BotoCoreError, ClientError, ResponseParserError, HTTPError


def _code(error: Exception) -> str:
    """The server's word for what is wrong; empty if it did not answer."""
    return getattr(error, "response", {}).get("Error", {}).get("Code", "")


def by_kind(connection: Connection, error: Exception) -> OSError:
    """The error of a request by its kind: FileNotFoundError, PermissionError, ConnectionError or OSError.

    What S3 refuses with a status of 4xx may be about the object or about the credentials: a PermissionError.
    """
    from botocore.exceptions import ClientError, ParamValidationError

    text = " ".join(str(error).split())
    if isinstance(error, ParamValidationError):
        return OSError(text)
    if not isinstance(error, ClientError):
        _forget(connection)  # the machine may have other credentials by now
        return ConnectionError(text)
    code = _code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ABOUT_THE_OBJECT or status == 416:
        return OSError(text)
    if status == 404 and code != "NoSuchBucket":
        return FileNotFoundError(text)
    if code in ABOUT_THE_CONNECTION or status not in range(400, 500) or status in (408, 429):
        if status < 500:
            _forget(connection)
        return ConnectionError(text)
    return PermissionError(text)


def _forget(connection: Connection) -> None:
    """Have the next request look for the machine's credentials again: a file of them may have been written anew."""
    if connection.access_key is None:
        client.cache_clear()


@lru_cache(maxsize=8)
def client(connection: Connection) -> Any:
    """botocore's client. What it raises is one of `failures`."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    made = botocore.session.get_session().create_client(
        "s3",
        region_name=connection.region or ("us-east-1" if connection.endpoint else None),
        endpoint_url=connection.endpoint,
        aws_access_key_id=connection.access_key,
        aws_secret_access_key=connection.secret_key,
        aws_session_token=connection.session_token,
        verify=_authority(connection),
        config=Config(
            signature_version=UNSIGNED if connection.anonymous else None,
            retries={"mode": "standard", "total_max_attempts": connection.attempts},
            connect_timeout=5,
            read_timeout=READ_TIMEOUT,
            max_pool_connections=POOL,
            s3={"addressing_style": "path"} if connection.endpoint else {},
        ),
    )
    if connection.requester_pays:
        made.meta.events.register("before-call.s3", _agree_to_pay)
    return made


def _authority(connection: Connection) -> str | None:
    """The file of AWS_CA_BUNDLE; each client says something else of one that is not there. Raises StorageError."""
    if connection.ca_bundle and not os.path.exists(connection.ca_bundle):
        raise StorageError(f"{connection.ca_bundle}: no such file; AWS_CA_BUNDLE names it")
    return connection.ca_bundle


def _agree_to_pay(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"


def create(connection: Connection, path: str, data: bytes) -> bool:
    """Write an object only if there is none: True for the one caller that made it, False for everyone else.

    Raises:
        OSError: as the server answers.
    """
    from botocore.exceptions import BotoCoreError

    try:
        _creating(connection).pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
            return False
        raise
    except BotoCoreError as error:  # s3fs makes no OSError of: no connection, no credentials
        raise OSError(str(error)) from error
    return True


@lru_cache(maxsize=8)
def _creating(connection: Connection) -> Any:
    import s3fs
    from aiobotocore.session import get_session

    session = get_session()
    if connection.requester_pays:  # s3fs's own switch leaves out the requests about a bucket
        session.register("before-call.s3", _agree_to_pay)
    return s3fs.S3FileSystem(
        session=session,
        key=connection.access_key,
        secret=connection.secret_key,
        token=connection.session_token,
        anon=connection.anonymous,
        use_listings_cache=False,
        endpoint_url=connection.endpoint,
        config_kwargs={"retries": {"mode": "standard", "max_attempts": connection.attempts}},
        client_kwargs=({"region_name": connection.region or "us-east-1"} if connection.endpoint else {})
        | ({"verify": authority} if (authority := _authority(connection)) else {}),
    )


def link(connection: Connection, source: str, target: str) -> bool:
    """Copy an object within the server, in one request; False if there is no ``source``.

    Raises:
        OSError: as the server answers.
    """
    (bucket, _, key), (target_bucket, _, target_key) = source.partition("/"), target.partition("/")
    try:
        client(connection).copy_object(Bucket=target_bucket, Key=target_key, CopySource={"Bucket": bucket, "Key": key})
    except failures() as error:
        if _code(error) in NO_KEY:
            return False
        raise OSError(str(error)) from error
    return True


def delete(connection: Connection, path: str, only: bytes | None = None) -> None:
    """Delete an object; nothing there is fine.

    Args:
        only: delete it only if it holds these bytes; the server compares again (``If-Match``) while it deletes.

    Raises:
        OSError: as the server answers.
    """
    bucket, _, key = path.partition("/")
    server = client(connection)
    condition = {}
    try:
        if only is not None:
            found = server.get_object(Bucket=bucket, Key=key)
            if found["Body"].read() != only:
                return
            condition = {"IfMatch": found["ETag"]}
        server.delete_object(Bucket=bucket, Key=key, **condition)
    except failures() as error:
        if _code(error) not in (*NO_KEY, "PreconditionFailed", "412"):
            raise OSError(str(error)) from error


def publish(connection: Connection, folder: Path, path: str, last: str) -> None:
    """Copy a local folder to ``path`` (``bucket/prefix``), a chunk at a time; the file ``last`` follows all others.

    Raises:
        OSError: as the server answers.
    """
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    for name in [name for name in names if name != last] + [last]:
        send(connection, folder / name, f"{path}/{name}")


def send(connection: Connection, file: Path, path: str) -> None:
    """Copy a local file to ``path`` (``bucket/key``), a chunk at a time.

    Raises:
        OSError: as the server answers.
    """
    target = filesystem(connection, background_writes=False)
    # Not pyarrow.fs.copy_files: of a file smaller than a chunk it drops the error that closing the upload raises.
    with file.open("rb") as source, target.open_output_stream(path) as upload:
        shutil.copyfileobj(source, upload, COPY_CHUNK)


def copy(connection: Connection, source: str, target: str) -> None:
    """Copy an object of any size within the server. (One request copies 5 GB at most; s3fs makes several.)

    Raises:
        OSError: as the server answers.
    """
    from botocore.exceptions import BotoCoreError

    try:
        _creating(connection).cp_file(source, target)
    except BotoCoreError as error:
        raise OSError(str(error)) from error


def fetch(connection: Connection, path: str, file: Path) -> None:
    """Copy the object ``path`` (``bucket/key``) to a local file, a chunk at a time: one attempt, one request.

    It goes on where ``file`` ends, so that a broken connection costs nothing twice.

    Raises:
        OSError: as the server answers, or the disk.
    """
    bucket, _, key = path.partition("/")
    with file.open("ab") as target:
        wanted = {"Range": f"bytes={target.tell()}-"} if target.tell() else {}
        try:
            answer = client(replace(connection, attempts=1)).get_object(Bucket=bucket, Key=key, **wanted)
            if "ContentRange" not in answer:
                target.truncate(0)  # the server sends all of it
            with answer["Body"] as body:
                shutil.copyfileobj(body, target, COPY_CHUNK)
        except failures() as error:
            raise by_kind(connection, error) from error
