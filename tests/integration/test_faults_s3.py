"""An S3 server that goes away for a while, answers 503, or is slow: the job waits, and every image is there once."""

import http.client
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
from conftest import all_cpus_free, find_weed, free_ports, make_bucket, photo, s3_environment, start_weed, wait_for_s3
from typer.testing import CliRunner

from cluster.storage import Storage, StorageError
from pipelines.archive.fetch import fetch
from pipelines.cli.main import app
from pipelines.runs.claim import find
from pipelines.runs.commits import read_commits
from pipelines.runs.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
AWAY = 8  # seconds; a client without patience, of three attempts, gives up long before


@pytest.fixture(scope="module")
def photos_of_a_job(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    return [photo(index, root / f"{index:03d}.png").read_bytes() for index in range(80)]


def fill(environment, pictures):
    for bucket in ("photos", "verdicts"):
        make_bucket(environment, bucket)
    storage = Storage(environment["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda index: storage.write(f"s3://photos/a/{index:03d}.png", pictures[index]), range(len(pictures))
            )
        )
    storage.write("s3://photos/a/torn.png", pictures[0][:100])
    return storage


def score(environment, bundle, monkeypatch, out="s3://verdicts/run"):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [
        "score",
        "s3://photos/a",
        "--model",
        bundle,
        "--out",
        out,
        "--actors",
        1,
        "--batch-size",
        1,
    ]
    return CliRunner().invoke(app, [str(word) for word in words])


def check(storage, images):
    """Every image once, and only the torn one among the errors."""
    filesystem, path = storage.resolve("s3://verdicts/run")
    results, errors = (pq.read_table(f"{path}/{name}", filesystem=filesystem) for name in ("results", "errors"))
    assert [row["uri"] for row in errors.to_pylist()] == ["s3://photos/a/torn.png"]
    assert sorted(results["uri"].to_pylist()) == [f"s3://photos/a/{index:03d}.png" for index in range(images)]


def commits(storage, out="s3://verdicts/run"):
    run = Run(out, storage)
    plan = find(run).plan
    return len(read_commits(run, plan)) if plan else 0


@contextmanager
def unreliable(endpoint):  # noqa: C901  (a server and its troubles, read in one piece)
    """A proxy before an S3 server, for whose requests ``faults["answer"]`` may have an answer of its own.

    ``faults["seen"]`` lists the requests so far, as (method, path).
    """
    target, numbers = urlsplit(endpoint).netloc, itertools.count(1)
    faults = {"answer": lambda number, path: None, "seen": []}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.body()
            faults["seen"].append((self.command, self.path))
            number = next(numbers)
            answer = faults["answer"](number, self.path)
            if answer is not None:
                return self.send(answer[0], {}, answer[1])
            connection = http.client.HTTPConnection(target)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            if answer.status == 412 and faults.get("unconditional"):  # as if it had done what it was asked to
                self.send(200, {"ETag": '"0"'}, b"")
            else:
                self.send(answer.status, dict(answer.getheaders()), data)
            connection.close()

        def body(self):
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []  # handed on as they came: sizes, trailers and all
            while True:
                chunks.append(self.rfile.readline())
                size = int(chunks[-1].split(b";")[0], 16)
                if size == 0:
                    break
                chunks.append(self.rfile.read(size + 2))
            while chunks[-1] != b"\r\n":
                chunks.append(self.rfile.readline())
            return b"".join(chunks)

        def send(self, status, headers, data):
            self.send_response_only(status)
            length = headers.get("Content-Length", str(len(data)))  # of a HEAD: the object's
            for name, value in (headers | {"Content-Length": length}).items():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up is none of the test's business
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield s3_environment(server.server_port), faults
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_is_slow_overloaded_and_gone_for_a_while(tmp_path, photos_of_a_job, tiny_bundle, monkeypatch):
    weed, ports = find_weed(), free_ports(4)
    servers = [start_weed(weed, tmp_path, ports)]
    seen = {"busy": 0, "slow": 0}

    def answer(number, path):
        """Every fifth request gets a 503, every seventh waits a second."""
        if number % 5 == 0:
            seen["busy"] += 1
            return 503, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
        if number % 7 == 0:
            seen["slow"] += 1
            time.sleep(1)
        return None

    def outage(storage):
        deadline = time.monotonic() + 90
        while commits(storage) < 2:
            assert time.monotonic() < deadline, "no commits"
            time.sleep(0.05)
        seen["commits"] = commits(storage)
        servers[0].kill()
        servers[0].wait()
        time.sleep(AWAY)
        servers.append(start_weed(weed, tmp_path, ports))

    try:
        direct = s3_environment(ports[0])
        wait_for_s3(direct, servers[0])
        storage = fill(direct, photos_of_a_job[:40])
        with unreliable(direct["AWS_ENDPOINT_URL"]) as (environment, faults), ThreadPoolExecutor(1) as pool:
            faults["answer"] = answer
            fault = pool.submit(outage, storage)
            outcome = score(environment, tiny_bundle, monkeypatch)
            assert outcome.exit_code == 0, outcome.output
            fault.result()
        assert 2 <= seen["commits"] < 5, "too late: the job was over"
        assert seen["busy"] > 20, seen
        assert seen["slow"] > 10, seen
        check(storage, 40)
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_a_server_that_ignores_conditions_is_refused_before_anything_is_written(
    s3_server, photos_of_a_job, tiny_bundle, monkeypatch
):
    storage, out = fill(s3_server, photos_of_a_job[:1]), "s3://verdicts/unconditional"
    with unreliable(s3_server["AWS_ENDPOINT_URL"]) as (environment, faults):
        faults["unconditional"] = True
        outcome = score(environment, tiny_bundle, monkeypatch, out)
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert "ignores the header If-None-Match" in outcome.stderr
    assert list(storage.walk(out)) == []


def test_credentials_that_expire_in_mid_run_and_an_object_that_is_denied(
    s3_server, photos_of_a_job, tiny_bundle, monkeypatch
):
    """The job stops with one line and no verdict about it; with good credentials the same command ends it."""
    pictures_of_the_job = photos_of_a_job[:70]
    storage, out = fill(s3_server, pictures_of_the_job), "s3://verdicts/expired"
    monkeypatch.setattr("cluster.s3.PATIENT_ATTEMPTS", 3)
    refusal = "<Error><Code>{}</Code><Message>no</Message></Error>".format
    committed, expired, pictures = threading.Event(), threading.Event(), itertools.count()

    def answer(number, path):
        if "/expired/commits/" in path and path.endswith("1.json"):
            committed.set()
        if "/photos/a/" in path and next(pictures) == 45:
            assert committed.wait(300)
            expired.set()
        if expired.is_set():
            return 400, refusal("ExpiredToken").encode()
        return (403, refusal("AccessDenied").encode()) if "/photos/a/007" in path else None

    with unreliable(s3_server["AWS_ENDPOINT_URL"]) as (environment, faults):
        faults["answer"] = answer
        outcome = score(environment, tiny_bundle, monkeypatch, out)
        assert outcome.exit_code == 2, outcome.output
        assert outcome.stderr.count("\n") == 1, outcome.stderr
        assert "refused the credentials" in outcome.stderr
        assert commits(storage, out) > 0
        assert all_cpus_free()
        faults["answer"] = lambda number, path: answer(number, "/photos/a/007") if "/photos/a/007" in path else None
        expired.clear()
        outcome = score(environment, tiny_bundle, monkeypatch, out)
    assert outcome.exit_code == 0, outcome.output
    assert "resuming after" in outcome.stdout
    filesystem, path = storage.resolve(out)
    results, errors = (pq.read_table(f"{path}/{name}", filesystem=filesystem) for name in ("results", "errors"))
    assert {row["uri"]: row["error_type"] for row in errors.to_pylist()} == {
        "s3://photos/a/007.png": "unreadable",
        "s3://photos/a/torn.png": "damaged",
    }
    assert len(set(results["uri"].to_pylist())) == results.num_rows == len(pictures_of_the_job) - 1


def test_a_server_that_stays_away_is_no_fault_of_an_image():
    (port,) = free_ports(1)
    storage = Storage(f"http://127.0.0.1:{port}", "key", "secret", region="us-east-1", attempts=2)
    row = {"uri": "s3://photos/a.png", "size": 5, "offset": None, "shard": None}
    with pytest.raises(StorageError, match="cannot reach"):
        fetch(storage, row)
    with pytest.raises(StorageError, match="cannot reach"):
        storage.create("s3://photos/marker", b"x")
