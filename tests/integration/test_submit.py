"""`glad submit` and `glad jobs` against a real head node that wants a token."""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import make_bucket, photo

from cluster.local_ray import free_ports
from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description
from pipelines.models.find import describe

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def cluster(s3_server):
    """A head node's dashboard URL and the environment of one who knows its token. The node has credentials for S3."""
    with tempfile.TemporaryDirectory(prefix="j", ignore_cleanup_errors=True) as name:
        token = Path(name) / "token"
        token.write_text("a-token-that-nobody-guesses-0123456789")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        dashboard, agent, client = free_ports(3)  # none that an outgoing connection could take in the meantime
        options = {
            "port": 0,
            "num-cpus": 2,
            "temp-dir": f"{name}/r",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
        }
        words = [f"--{option}={value}" for option, value in options.items()]
        log = Path(name) / "log"
        with log.open("wb") as output:
            head = subprocess.Popen(
                [BIN / "ray", "start", "--head", "--block", *words],
                env=environment | s3_server | {"GLAD_CACHE": f"{name}/cache"},
                stdout=output,
                stderr=output,
            )
        try:
            url = f"http://127.0.0.1:{dashboard}"
            deadline = time.monotonic() + 300
            while subprocess.run([BIN / "glad", "jobs", "list", "--address", url], env=environment).returncode:
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(1)
            yield url, environment
        finally:
            processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
            for process in processes:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, timeout=20)
            head.wait()


def glad(environment, *words):
    done = subprocess.run([BIN / "glad", *map(str, words)], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_job_is_sent_followed_listed_and_given_again(cluster, tiny_bundle, tmp_path):
    url, environment = cluster
    for index in range(6):
        photo(index, tmp_path / "archive" / f"{index}.png")
    words = ["score", tmp_path / "archive", "--model", tiny_bundle, "--out", tmp_path / "out", "--actors", 1]
    secret = {"AWS_ACCESS_KEY_ID": "the-id", "AWS_SECRET_ACCESS_KEY": "the-secret", "AWS_REGION": "mars-1"}
    code, out, err = glad(environment | secret, "submit", "--address", url, "--", *words)
    assert code == 0, out + err
    assert "6 images in" in out
    assert "the nodes need" in out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["counts"]["scored"] == 6

    code, out, _ = glad(environment, "jobs", "list", "--json", "--address", url)
    (job,) = json.loads(out)
    assert (code, job["status"]) == (0, "SUCCEEDED")
    from ray.job_submission import JobSubmissionClient

    sent = glad(environment, "jobs", "logs", job["id"], "--address", url)[1]
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    details = JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"}).get_job_info(job["id"])
    assert "mars-1" in str(details)
    for text in (sent, str(details), *(path.read_text() for path in (tmp_path / "out").glob("*.json"))):
        assert "the-secret" not in text
        assert "the-id" not in text

    code, out, err = glad(environment, "jobs", "retry", job["id"], "--address", url)
    assert code == 0, out + err
    assert "this run is complete" in out


def test_a_job_that_fails_says_so_and_one_that_is_not_there_too(cluster, tmp_path):
    url, environment = cluster
    words = ["score", tmp_path / "nothing", "--model", "small", "--out", tmp_path / "out"]
    code, out, err = glad(environment, "submit", "--address", url, "--", *words)
    assert code == 1, out + err
    assert "failed" in out.splitlines()[-1]
    assert "no such file or folder" in out
    code, _, err = glad(environment, "jobs", "stop", "raysubmit_none-such", "--address", url)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no such job" in err


def test_a_model_is_calibrated_with_everything_on_s3(cluster, s3_server, tiny_bundle, tmp_path, monkeypatch):
    url, environment = cluster
    environment = environment | {name: s3_server[name] for name in ("AWS_ENDPOINT_URL", "AWS_REGION")}
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    make_bucket(s3_server, "submit")
    storage, out = Storage.from_environment(), "s3://submit/calibrated"
    storage.publish(tiny_bundle, "s3://submit/tiny", "glad.json")
    for index in range(10):
        with tempfile.TemporaryDirectory() as folder:
            storage.write(f"s3://submit/good/{index}.png", photo(index, Path(folder) / "x.png").read_bytes())
    storage.write(f"{out}.calibrate/claim", b"of a command that was killed")
    storage.write(f"{out}.calibrate/bundle/glad.json", b"half")
    storage.write(f"{out}/vae/config.json", b"half")
    words = ["calibrate", "s3://submit/good", "--model", "s3://submit/tiny", "--out", out, "--target-fpr", 0.1]
    sent = environment | {"GLAD_CALIBRATE_THRESHOLD_ONLY": "true"}
    code, text, err = glad(sent, "submit", "--address", url, "--", *words)
    assert code == 0, text + err
    assert "choosing the denoising steps" not in text  # what the sender's environment asks for
    assert "from 10 good images" in text
    description = describe(out, storage)
    assert description.provenance["calibration_images"] == 10
    assert description.files == read_description(tiny_bundle).files
    assert list(storage.walk(f"{out}.calibrate")) == []
    assert not Path("s3:").exists()


@pytest.mark.parametrize("token", [None, "another-token-of-some-length-0123"])
def test_without_the_token_nobody_is_let_in(cluster, tmp_path, token):
    url, environment = cluster
    stranger = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    stranger["HOME"] = str(tmp_path)  # no token lies there
    if token:
        stranger |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    words = ["score", tmp_path, "--model", "small", "--out", tmp_path / "out"]
    code, _, err = glad(stranger, "submit", "--address", url, "--", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "refused the token" in err
