import os
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from conftest import find_weed, make_bucket, serve_s3
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cluster import s3
from cluster.storage import Storage, StorageError


def test_settings_come_from_the_environment_and_secrets_stay_out_of_the_repr(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    assert s3.Connection.from_environment() == s3.Connection()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://somewhere:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    connection = s3.Connection.from_environment()
    assert (connection.endpoint, connection.access_key, connection.secret_key) == (
        "http://somewhere:1",
        "the-id",
        "the-secret",
    )
    assert "the-secret" not in repr(connection)
    assert "the-id" not in repr(connection)


def test_clients_are_kept_per_connection():
    here, there = (s3.Connection(f"http://127.0.0.1:{port}", "id", "secret") for port in (1, 2))
    assert s3.filesystem(here) is s3.filesystem(s3.Connection("http://127.0.0.1:1", "id", "secret"))
    assert s3.filesystem(here) is not s3.filesystem(there)
    assert s3.filesystem(here) is not s3.filesystem(here.patient())


@pytest.fixture
def bucket(s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    make_bucket(s3_server, "copies")
    return "s3://copies"


@pytest.fixture
def moody_server():
    """A server that answers each PUT with the next status of a list, then with 200; and what it was sent."""
    answers, bodies = [], []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            status, code = answers.pop(0) if answers else (200, "")
            data = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers, bodies
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("statuses", "attempts", "words"),
    [
        ([], 1, None),
        ([(503, "SlowDown"), (500, "InternalError")], 3, None),
        ([(400, "ExpiredToken")], 2, None),  # the machine may have new credentials by then
        ([(503, "SlowDown")] * 3, 3, "overloaded or down"),
        ([(403, "AccessDenied")], 1, "refused the credentials"),
        ([(400, "KeyTooLongError")], 1, "KeyTooLongError"),
    ],
)
def test_a_write_is_one_request_and_is_repeated_after_drawn_waits(monkeypatch, moody_server, statuses, attempts, words):
    endpoint, answers, bodies = moody_server
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    answers += statuses
    storage = Storage(endpoint, "id", "secret", region="us-east-1")
    if words is None:
        storage.write("s3://bucket/key", b"data")
    else:
        with pytest.raises(StorageError, match=words) as error:
            storage.write("s3://bucket/key", b"data")
        assert "\n" not in str(error.value)
    assert len(bodies) == attempts
    assert all(b"data" in body for body in bodies)
    assert len(waits) == attempts - 1
    assert all(0.5 * 2**number <= wait <= 2**number for number, wait in enumerate(waits))


@pytest.mark.slow
def test_a_bundle_goes_up_and_comes_down_unchanged(bucket, tmp_path):
    storage = Storage.from_environment()
    contents = {"glad.json": b"{}", "unet/weights": os.urandom(2 * s3.COPY_CHUNK + 1), "empty": b"", ".hidden": b"x"}
    for name, data in contents.items():
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_bytes(data)
    assert storage.publish(tmp_path / "made", f"{bucket}/models/v1", "glad.json")
    assert not storage.publish(tmp_path / "made", f"{bucket}/models/v1", "glad.json")
    assert storage.read(f"{bucket}/models/v1/.hidden") == b"x"  # publishing copies everything, walking skips it
    for name, data in contents.items():
        storage.fetch(f"{bucket}/models/v1/{name}", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        (tmp_path / "copy").unlink()
    (tmp_path / "copy").write_bytes(contents["unet/weights"][:-9])  # of a connection that broke
    storage.fetch(f"{bucket}/models/v1/unet/weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == contents["unet/weights"]


@pytest.mark.slow
def test_the_last_file_arrives_last(bucket, tmp_path, monkeypatch):
    storage = Storage.from_environment()
    for name in ("glad.json", "z"):
        (tmp_path / name).write_text(name)
    copy = s3.shutil.copyfileobj

    def fails_at_z(source, *arguments):
        if source.name.endswith("z"):
            raise OSError("AWS Error ACCESS_DENIED during PutObject")
        copy(source, *arguments)

    monkeypatch.setattr(s3.shutil, "copyfileobj", fails_at_z)
    with pytest.raises(StorageError, match="refused the credentials") as error:
        storage.publish(tmp_path, f"{bucket}/models/v2", "glad.json")
    assert "\n" not in str(error.value)
    assert storage.kind(f"{bucket}/models/v2/glad.json") == "none"


@pytest.mark.slow
def test_a_server_that_refuses_what_was_sent_is_never_taken_for_one_that_has_it(tmp_path):
    (tmp_path / "made").mkdir()
    for name in ("glad.json", "small"):
        (tmp_path / "made" / name).write_text(name)  # smaller than a chunk: refused only when the upload is closed
    (tmp_path / "weed").mkdir()
    with serve_s3(find_weed(), tmp_path / "weed", volumes=7) as environment:  # all taken by the bucket it starts with
        make_bucket(environment, "full")
        storage = Storage(environment["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
        with pytest.raises(StorageError, match="internal error") as error:
            storage.publish(tmp_path / "made", "s3://full/v1", "glad.json")
        assert "\n" not in str(error.value)
        with pytest.raises(StorageError):
            storage.write("s3://full/x", b"x")
        assert storage.kind("s3://full/v1/glad.json") == "none"


@pytest.mark.slow
def test_a_bundle_that_is_gone_or_forbidden_is_one_line(bucket, tmp_path):
    storage = Storage.from_environment()
    stranger = Storage(storage.endpoint, "nobody", "nothing", region="us-east-1")
    for reader, uri, words in (
        (storage, "s3://no-such-bucket-here/v1", "no bucket 'no-such-bucket-here'"),
        (stranger, f"{bucket}/models/v1", "refused the credentials"),
    ):
        with pytest.raises(StorageError, match=words) as error:
            reader.fetch(f"{uri}/glad.json", tmp_path / "copy")
        assert "\n" not in str(error.value)


COPY = """
import sys
from pathlib import Path
from cluster.storage import Storage

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

storage, folder, uri = Storage.from_environment(), Path(sys.argv[1]), sys.argv[2]
storage.kind(uri)
before = peak()
storage.publish(folder, uri, "glad.json")
storage.fetch(f"{uri}/weights", folder.with_name("copy"))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_is_copied_in_little_memory(bucket, tmp_path):
    size = 128 * 2**20
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "glad.json").write_text("{}")
    with (tmp_path / "made" / "weights").open("wb") as weights:
        weights.truncate(size)
    command = [sys.executable, "-c", COPY, str(tmp_path / "made"), f"{bucket}/models/large"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(outcome.stdout) < size / 2
    assert (tmp_path / "copy").stat().st_size == size
    Storage.from_environment().delete_folder(f"{bucket}/models/large")


@pytest.mark.slow
def test_what_the_run_protocol_asks_of_a_server(bucket):
    storage = Storage.from_environment()
    at = f"{bucket}/protocol"
    storage.check_creates(at)
    assert list(storage.walk(at)) == []
    assert not storage.link(f"{at}/none", f"{at}/copy")
    assert storage.create(f"{at}/a", b"one")
    assert not storage.create(f"{at}/a", b"two")
    assert storage.link(f"{at}/a", f"{at}/copy")
    assert storage.read_all([f"{at}/a", f"{at}/none", f"{at}/copy"]) == [b"one", None, b"one"]
    assert storage.holds(f"{at}/copy", 3)
    assert not storage.holds(f"{at}/copy", 4)
    assert not storage.holds(f"{at}/none", 0)
    storage.delete_file(f"{at}/a", only=b"two")
    storage.delete_file(f"{at}/none", only=b"one")
    assert storage.read_all([f"{at}/a"]) == [b"one"]
    storage.delete_file(f"{at}/a", only=b"one")
    storage.delete_files([f"{at}/copy", f"{at}/none"])
    assert storage.read_all([f"{at}/a", f"{at}/copy"]) == [None, None]


def certificate(folder: Path) -> tuple[str, str]:
    """A certificate for 127.0.0.1 that signed itself, and its key."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_a_server_with_an_authority_of_its_own_and_other_terms(tmp_path, monkeypatch):
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append({name.lower(): value for name, value in self.headers.items()})
            contents = "<Contents><Key>flat/a.png</Key><Size>1</Size><ETag>x</ETag></Contents>"
            body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200 if self.path.endswith("a.png") else 404)
            self.send_header("Content-Length", "1")
            self.end_headers()

        def log_message(self, *_):
            pass

    cert, key = certificate(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        with pytest.raises(StorageError, match=r"certificate that this machine does not trust; set AWS_CA_BUNDLE"):
            list(Storage.from_environment().entries("s3://b/flat"))
        monkeypatch.setenv("AWS_CA_BUNDLE", cert)
        assert [entry.path for entry in Storage.from_environment().entries("s3://b/flat")] == ["a.png"]
        assert "authorization" in seen[-1]
        assert "x-amz-request-payer" not in seen[-1]
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
        monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
        assert [entry.path for entry in Storage.from_environment().entries("s3://b/flat")] == ["a.png"]
        asked = len(seen)
        assert Storage.from_environment().kind("s3://b/flat") == "folder"
        assert Storage.from_environment().open("s3://b/flat/a.png").read() != b""
        assert len(seen) > asked + 1
        for headers in seen[asked - 1 :]:
            assert "authorization" not in headers
            assert headers["x-amz-request-payer"] == "requester"
        monkeypatch.setenv("AWS_CA_BUNDLE", "/none.pem")
        with pytest.raises(StorageError, match=r"/none.pem: no such file; AWS_CA_BUNDLE names it"):
            Storage.from_environment().kind("s3://b/flat")
    finally:
        server.shutdown()
        server.server_close()
