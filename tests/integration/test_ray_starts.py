"""Ray that starts slowly, dies, or is stopped together with the command: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
from conftest import photo

pytestmark = pytest.mark.slow
CONNECT = """
import sys
from cluster import session
session.START_SECONDS = tuple(map(float, sys.argv[1:]))
try:
    session.connect()
    print("READY", session.resources()["CPU"] > 0)
finally:
    session.disconnect()
"""
IMAGES = 200  # more than are scored before a signal comes
GLAD = "from pipelines.cli.main import main; main()"


class Command:
    """A process in a terminal session of its own, whose lines are kept."""

    def __init__(self, code, *words):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self.reader.start()
        self.children = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        for child in self.children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self.reader.join()

    def wait_for(self, condition, seconds=420):
        """Until the condition holds; remembers every child on the way."""
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            if result := condition():
                return result
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.05)  # a look takes some milliseconds of a CPU

    def look(self):
        with suppress(psutil.NoSuchProcess):
            self.children |= dict.fromkeys(psutil.Process(self.process.pid).children(recursive=True))

    def child(self, name):
        for child in self.children:
            with suppress(psutil.NoSuchProcess):
                if child.name() == name:
                    return child
        return None

    def said(self, words):
        return any(words in line for line in self.lines)

    def end(self):
        """Its exit code and last line; no process of it may be left."""
        code = self.process.wait(420)
        _, left = psutil.wait_procs([child for child in self.children if child.is_running()], 180)
        assert left == []
        self.reader.join()
        return code, self.lines[-1].rstrip()


def test_a_start_that_hangs_is_tried_once_more():
    with Command(CONNECT, 20, 300, 300) as command:  # Ray itself may give up within 30 seconds on a busy machine
        command.wait_for(lambda: command.child("gcs_server")).suspend()
        command.wait_for(lambda: command.said("not ready within 20 seconds; trying once more"))
        assert command.end() == (0, "READY True"), command.lines
        assert command.lines[0] == "starting Ray\n"


def test_two_starts_too_slow_are_one_error_and_leave_nothing():
    with Command(CONNECT, 0.2, 0.4) as command:
        command.wait_for(lambda: command.said("trying once more"))
        code, line = command.end()
    assert code == 1
    assert line.startswith("cluster.session.SessionError: Ray did not start on this machine, twice: not ready within")


@pytest.fixture
def score(tmp_path, tiny_bundle):
    for index in range(IMAGES):
        photo(index, tmp_path / "photos" / f"{index:03d}.png")
    return ["score", tmp_path / "photos", "--model", tiny_bundle, "--out", tmp_path / "out", "--actors", 1]


def commits(out):
    return len(list((out / "commits").glob("*.json")))


def test_a_job_that_is_stopped_or_whose_ray_dies_says_how_far_it_came_and_continues(score, tmp_path):
    with Command(GLAD, *score) as command:
        command.wait_for(lambda: command.said("starting Ray"))
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        assert command.end() == (130, "stopped; the same command continues")
    with Command(GLAD, *score) as command:
        command.wait_for(lambda: commits(tmp_path / "out"))
        command.child("raylet").kill()
        code, line = command.end()
        assert code == 1
        assert line.startswith("Error: Ray on this machine died, perhaps for lack of memory: stopped after ")
        assert [line for line in command.lines if "(raylet)" in line] == []
    with Command(GLAD, *score) as command:
        command.wait_for(lambda: command.said("resuming after"))
        before = commits(tmp_path / "out")
        command.wait_for(lambda: commits(tmp_path / "out") > before)
        command.process.send_signal(signal.SIGTERM)
        code, line = command.end()
        assert code == 143
        assert line.startswith("stopped after ")
        assert line.endswith(f" of {IMAGES} images; the same command continues")
        # A busy machine may need the second start.
        lines = [line for line in command.lines if not line.startswith("Ray did not start: ")]
        assert [line for line in lines if "***" in line or "Traceback" in line or "ray" in line] == []
    with Command(GLAD, *score) as command:
        command.wait_for(lambda: command.said("resuming after"))
        assert command.end()[0] == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["counts"]["scored"] == IMAGES
