"""An actor killed, a driver that sleeps and one that is killed, in one job: nothing lost or twice, the same content."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import photo
from typer.testing import CliRunner

from cluster import session
from pipelines.cli.main import app

pytestmark = pytest.mark.slow
IMAGES = 64


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    for index in range(IMAGES):
        path = photo(index, root / f"{index % 7}" / f"{index:03d}.png")
        if index % 32 == 0:
            path.write_bytes(path.read_bytes()[:100])
    return root


def command(archive, bundle, out):
    # One image in flight, so that not even rounding depends on who was scored beside whom.
    words = ["score", archive, "--model", bundle, "--out", out, "--batch-size", 1, "--actors", 1]
    return [str(word) for word in words]


def start(words, log, before=""):
    """`glad` in a process of its own, which first runs the Python code ``before``."""
    environment = os.environ | session.QUIET | {"OMP_NUM_THREADS": "1"}
    glad = f"{before}\nfrom pipelines.cli.main import main; main()"
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, "-c", glad, *words], stdout=output, stderr=output, env=environment)


def commits(out):
    return list((out / "commits").glob("*.json"))


def wait_for_commits(out, count, driver, log):
    deadline = time.monotonic() + 240
    while len(commits(out)) < count:
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def kill_actor(driver):
    """kill -9 the process that runs the model."""
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "MapWorker(MapBatches(GladActor" in " ".join(process.cmdline()):
                process.kill()
                return True
    return False


def content(out):
    found = {}
    for name in ("results", "errors"):
        for row in pq.read_table(out / name).to_pylist():
            row.pop("seconds", None)
            assert row["image_id"] not in found, "an image twice"
            found[row["image_id"]] = row
    return found


def test_an_actor_and_a_driver_killed_and_another_that_sleeps_until_the_run_is_complete(
    tmp_path, archive, tiny_bundle, ray_session
):
    calm = tmp_path / "calm"
    outcome = CliRunner().invoke(app, command(archive, tiny_bundle, calm))
    assert outcome.exit_code == 0, outcome.output

    out, log, sleepers_log = tmp_path / "out", tmp_path / "log", tmp_path / "sleeper.log"
    words = command(archive, tiny_bundle, out)
    sleeper = driver = start(words, sleepers_log)
    try:
        wait_for_commits(out, 1, sleeper, sleepers_log)
        assert kill_actor(sleeper)
        wait_for_commits(out, 2, sleeper, sleepers_log)
        sleeper.send_signal(signal.SIGSTOP)  # its actors and writers go on for a while

        driver = start(words, log)
        before = len(commits(out))
        wait_for_commits(out, before + 2, driver, log)
        driver.kill()
        driver.wait()
        assert not (out / "run.json").exists()
        kept = {path.name: path.read_bytes() for path in commits(out)}
        assert 3 <= len(kept) < IMAGES // 8, "too late: the job was over"

        driver = start(words, log)
        assert driver.wait(300) == 0, log.read_text()
        assert log.read_text().count("resuming after") == 2
        complete = (out / "run.json").read_bytes(), content(out)
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(300) == 0, sleepers_log.read_text()
    finally:
        sleeper.kill()
        driver.kill()
    assert ((out / "run.json").read_bytes(), content(out)) == complete
    assert complete[1] == content(calm)
    for name, data in kept.items():
        assert (out / "commits" / name).read_bytes() == data, "a committed shard was done again"
    counts = json.loads((out / "run.json").read_text())["counts"]
    assert counts == json.loads((calm / "run.json").read_text())["counts"]
    assert (counts["images"], counts["errors"]) == (IMAGES, IMAGES // 32)
    named = {file for path in commits(out) for file in json.loads(path.read_text())["files"]}
    assert named == {str(path.relative_to(out)) for path in out.glob("[re]*s/**/part-*.parquet")}
    assert f"errors    │ {IMAGES // 32} " in sleepers_log.read_text()
