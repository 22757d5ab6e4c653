"""Copies of bundles on one machine: eight processes at once, one of them killed, and a disk that gets full."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_bucket
from test_faults_disk import small_disk  # noqa: F401  (a fixture)
from test_faults_s3 import unreliable

from cluster.storage import Storage, StorageError
from glad_core.bundle.glad_json import read_description, verify
from pipelines.models import cache
from pipelines.models.find import local_bundle

pytestmark = pytest.mark.slow
LOCATION = "s3://cache/bundle"
COPIERS = 8
COPIER = """
import os, sys
from cluster.storage import Storage
from pipelines.models.find import local_bundle
for _ in range(int(sys.argv[2])):
    if os.fork() == 0:
        folder = local_bundle(sys.argv[1], Storage.from_environment())
        os.write(1, f"{folder}\\n".encode())  # in one piece: all of them write there
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


@pytest.fixture
def bundle_on_s3(tiny_bundle, s3_server, monkeypatch):
    make_bucket(s3_server, "cache")
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    storage = Storage.from_environment()
    storage.publish(tiny_bundle, LOCATION, "glad.json")
    return storage


def folders(bundles):
    return [path for path in bundles.iterdir() if path.is_dir()]


def test_a_disk_that_gets_full_is_one_line(bundle_on_s3, small_disk, monkeypatch):  # noqa: F811
    monkeypatch.setenv("GLAD_CACHE", str(small_disk))
    with pytest.raises(StorageError, match="too few for a copy"):
        local_bundle(LOCATION, bundle_on_s3)  # it has two megabytes, the disk one
    monkeypatch.setattr(cache, "_make_room", lambda *_: None)  # as if others filled it in the meantime
    with pytest.raises(StorageError, match=r"no copy of .* can be kept there \(No space left on device\)") as error:
        local_bundle(LOCATION, bundle_on_s3)
    assert "\n" not in str(error.value)
    assert str(small_disk) in str(error.value)
    assert folders(small_disk / "bundles") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_processes_make_one_copy_and_go_on_when_the_copier_is_killed(
    tiny_bundle, bundle_on_s3, s3_server, tmp_path
):
    bundles = tmp_path / "cache" / "bundles"
    requests: Counter[str] = Counter()
    killed: list[int] = []
    with unreliable(s3_server["AWS_ENDPOINT_URL"]) as (environment, faults):

        def answer(number, path):
            requests[path.partition("?")[0].removeprefix("/cache/bundle/")] += 1
            if "vae/diffusion" in path and not killed:
                killed.append(copier(bundles))
                os.kill(killed[0], signal.SIGKILL)
            return None

        faults["answer"] = answer
        done = subprocess.run(
            [sys.executable, "-c", COPIER, LOCATION, str(COPIERS)],
            env=os.environ
            | environment
            | {"GLAD_CACHE": str(bundles.parent), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
    assert killed
    assert done.stdout.split() == [str(*folders(bundles))] * (COPIERS - 1), done.stderr
    assert verify(*folders(bundles)) == verify(tiny_bundle)
    assert requests.pop("glad.json") == COPIERS
    assert max(requests.values()) == 2, requests  # the half copy, and the whole one
    assert sum(requests.values()) <= 2 * (len(read_description(tiny_bundle).files) + 1)  # and its list


def copier(bundles: Path) -> int:
    """The process that writes to a half copy."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith(str(bundles)) and ".part/" in target:
                return int(descriptor.parts[2])
    raise AssertionError("nobody copies")
