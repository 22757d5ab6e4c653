"""What a failed read says about the image, the connection or the disk; a server that answers as it is told to."""

import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tenacity

from cluster import local, s3
from cluster.storage import Storage, StorageError
from glad_core.decoding.picture import ImageError
from pipelines.archive import fetch as fetch_module
from pipelines.archive.fetch import fetch

BODY = b"0123456789" * 100


def xml(code):
    return f"<Error><Code>{code}</Code><Message>said the server</Message></Error>".encode()


class Server(ThreadingHTTPServer):
    """Answers a GET by the first of ``rules`` whose pattern is in the key: (status, body) or a function that writes."""

    daemon_threads = True

    def __init__(self):
        self.forget()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.requests.append(self.path)
                rule = next((rule for pattern, rule in server.rules.items() if re.search(pattern, self.path)), None)
                rule = rule.pop(0) if isinstance(rule, list) and rule else rule
                if callable(rule):
                    return rule(self)
                status, body = rule or (200, BODY)
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                extra = {}
                if wanted and status == 200:
                    first, last = map(int, wanted.groups())
                    extra = {"Content-Range": f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"}
                    status, body = 206, body[first : last + 1]
                self.answer(status, body, extra)

            def answer(self, status, body, extra=(), length=None):
                self.send_response(status)
                headers = {"Content-Length": str(length or len(body)), "ETag": server.etag, **dict(extra)}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def forget(self):
        self.rules, self.requests, self.etag = {}, [], '"one"'

    def storage(self, attempts=6):
        return Storage(f"http://127.0.0.1:{self.server_port}", "key", "secret", region="us-east-1", attempts=attempts)


def cut(handler):
    """A body that ends before its Content-Length."""
    handler.answer(200, BODY[:400], length=len(BODY))
    handler.close_connection = True


def hang_up(handler):
    handler.close_connection = True


@pytest.fixture(scope="module")
def one_server():
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture
def server(one_server):
    one_server.forget()
    return one_server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Attempts follow each other at once."""
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)


def row(key, **more):
    return {"uri": f"s3://photos/{key}", "size": None, "offset": None, "shard": None, "version": None} | more


OTHERS = [row("first.png"), row("good.png"), row("last.png")]

PASSING = {
    "expired": (400, xml("ExpiredToken")),
    "skewed": (403, xml("RequestTimeTooSkewed")),
    "unknown key": (403, xml("InvalidAccessKeyId")),
    "signature": (403, xml("SignatureDoesNotMatch")),
    "forbidden": (403, xml("AccessDenied")),
    "forbidden without a word": (403, b""),
    "throttled": (503, xml("SlowDown")),
    "too many": (429, b"slow down"),
    "internal": (500, xml("InternalError")),
    "gateway": (502, b"<html>Bad Gateway</html>"),
    "timeout": (504, b""),
    "timeout of the request": (400, xml("RequestTimeout")),
    "no bucket for a moment": (404, xml("NoSuchBucket")),
    "cut": cut,
    "hung up": hang_up,
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_trouble_that_passes_leaves_no_trace(server, trouble):
    server.rules["image"] = [trouble, trouble]
    assert fetch(server.storage(), row("image.png")) == BODY
    assert len(server.requests) == 3


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_trouble_of_the_connection_stops_the_job(server, trouble):
    server.rules["."] = trouble
    with pytest.raises(StorageError) as error:
        fetch(server.storage(), row("image.png"), lambda: OTHERS)
    assert str(error.value).startswith("s3://photos/image.png: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_trouble_with_one_object_is_its_own(server, trouble):
    server.rules["image|first"] = trouble
    with pytest.raises(ImageError) as error:
        fetch(server.storage(), row("image.png"), lambda: OTHERS)
    assert error.value.kind == "unreadable"
    tries = sum("image" in path for path in server.requests)
    assert tries == (3 if trouble in [PASSING["forbidden"], PASSING["forbidden without a word"]] else 9)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((404, xml("NoSuchKey")), "missing"),
        ((404, b""), "missing"),
        ((403, xml("InvalidObjectState")), "unreadable"),
        ((416, xml("InvalidRange")), "unreadable"),
        ((200, b""), "empty"),
    ],
)
def test_what_concerns_an_object_needs_no_second_try(server, answer, kind):
    server.rules["image"] = answer
    with pytest.raises(ImageError) as error:
        fetch(server.storage(), row("image.png"))
    assert error.value.kind == kind
    assert len(server.requests) == 1


def test_an_object_that_changed_is_refused_before_its_bytes_come(server):
    listed = {"version": '"one"', "size": len(BODY)}
    member = {"shard": "s3://photos/a.tar", "offset": 20, "size": 10, "version": '"one"'}
    assert fetch(server.storage(), row("image.png", **listed)) == BODY
    assert fetch(server.storage(), row("x", **member)) == BODY[:10]
    server.etag = '"two"'
    for changed in (row("image.png", **listed), row("x", **member)):
        with pytest.raises(ImageError, match="changed since it was listed; give the command again") as error:
            fetch(server.storage(), changed)
        assert error.value.kind == "changed"
    assert fetch(server.storage(), row("image.png")) == BODY  # from a list of URIs: nothing is known of it
    server.etag = 'W/"one"'
    assert fetch(server.storage(), row("image.png", **listed)) == BODY


def test_another_size_is_another_object_and_a_short_tar_too(server):
    for changed in (
        row("image.png", size=5),
        row("x", shard="s3://photos/a.tar", offset=990, size=20),
    ):
        with pytest.raises(ImageError) as error:
            fetch(server.storage(), changed)
        assert error.value.kind == "changed"


def test_an_object_of_unknown_size_that_is_too_large_is_not_downloaded(server, monkeypatch):
    monkeypatch.setattr(fetch_module, "MAX_BYTES", 500)
    with pytest.raises(ImageError, match="1000 bytes, more than the 500") as error:
        fetch(server.storage(), row("image.png"))
    assert error.value.kind == "too_large"


def test_credentials_that_the_machine_renews_are_taken_up(server, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    write = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\n".format
    file.write_text(write("old"))
    storage = Storage(f"http://127.0.0.1:{server.server_port}", region="us-east-1")

    def only_new(handler):
        if "Credential=new/" in handler.headers["Authorization"]:
            return handler.answer(200, BODY)
        file.write_text(write("new"))  # renewed just after it expired
        handler.answer(400, xml("ExpiredToken"))

    server.rules["image"] = only_new
    assert fetch(storage, row("image.png")) == BODY
    file.unlink()
    s3.client.cache_clear()
    with pytest.raises(StorageError, match="refused the credentials"):
        fetch(storage, row("image.png"))


def test_a_local_file_that_changed(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(BODY)
    status = file.stat()
    listed = row("", uri=str(file), size=status.st_size, version=str(status.st_mtime_ns))
    assert fetch(Storage(), listed) == BODY
    os.utime(file, ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(ImageError, match=r"a\.png: changed since it was listed") as error:
        fetch(Storage(), listed)
    assert error.value.kind == "changed"

    real = os.fstat

    def written_to(handle):
        status = real(handle)
        with file.open("ab") as writer:
            writer.write(b"more")
        return status

    monkeypatch.setattr(local.os, "fstat", written_to)
    with pytest.raises(ImageError, match="changed while it was read"):
        fetch(Storage(), row("", uri=str(file)))


def broken(monkeypatch, number, names):
    """Opening files of these names fails with this errno."""
    real = os.open

    def fails(path, *arguments, **options):
        if any(name in str(path) for name in names):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(local.os, "open", fails)


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EACCES", "EPERM", "ENOTCONN", "EMFILE", "EHOSTDOWN"])
def test_a_disk_or_one_file(tmp_path, monkeypatch, name):
    import errno

    number = getattr(errno, name)
    for file in ("a.png", "b.png"):
        (tmp_path / file).write_bytes(BODY)
    bad, good = (row("", uri=str(tmp_path / file)) for file in ("a.png", "b.png"))
    broken(monkeypatch, number, ["a.png"])
    with pytest.raises(ImageError) as error:
        fetch(Storage(), bad, lambda: [good], str(tmp_path))
    assert error.value.kind == "unreadable"
    broken(monkeypatch, number, [".png"])
    with pytest.raises(StorageError, match=r"a\.png: .") as stopped:
        fetch(Storage(), bad, lambda: [good], str(tmp_path))
    assert "\n" not in str(stopped.value)


def test_a_missing_file_and_a_disk_that_is_gone(tmp_path):
    mount = tmp_path / "mount"
    (mount / "left").mkdir(parents=True)
    missing = row("", uri=str(mount / "a.png"))
    for source in (mount, mount / "*.png", mount / "l*" / "?.png"):
        with pytest.raises(ImageError) as error:
            fetch(Storage(), missing, source=str(source))
        assert error.value.kind == "missing"
    (mount / "left").rmdir()
    for source in (mount, mount / "*.png", mount / "sub", mount / "sub" / "*" / "x.png"):
        with pytest.raises(StorageError, match="gone or empty"):
            fetch(Storage(), missing, source=str(source))


def test_no_pipe_is_waited_for_and_odd_names_are_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    begin = time.monotonic()
    for uri, kind in (
        (str(tmp_path / "pipe.png"), "missing"),
        (str(tmp_path), "missing"),
        (str(tmp_path / "a\0b.png"), "unreadable"),
        ("x" * 300, "unreadable"),
        ("gs://bucket/x.png", "unreadable"),
        ("s3://", "unreadable"),
        ("s3://bucket", "unreadable"),
        ("s3://no valid bucket!/x.png", "unreadable"),
    ):
        with pytest.raises(ImageError) as error:
            fetch(Storage(), row("", uri=uri))
        assert error.value.kind == kind, uri
        assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 30
