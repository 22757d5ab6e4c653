"""The notice of AWS, from a server that answers as the metadata service does."""

import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from ray.scripts.scripts import drain_node

from cluster import spot_notice
from cluster.spot_notice import drain_command, is_noticed


@pytest.fixture
def service():
    """The address of a metadata service, and its state: ``status`` of the question for a notice."""
    state = {"status": 404}

    class Metadata(BaseHTTPRequestHandler):
        def do_PUT(self):
            allowed = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200 if allowed else 403, b"the-token")

        def do_GET(self):
            allowed = self.headers["X-aws-ec2-metadata-token"] == "the-token"
            right = self.path == "/latest/meta-data/spot/instance-action"
            self.answer(state["status"] if allowed and right else 401, b'{"action": "terminate"}')

        def answer(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/latest", state
    server.shutdown()
    server.server_close()


def test_a_notice_is_seen_when_it_comes(service):
    address, state = service
    assert not is_noticed(address)
    state["status"] = 200
    assert is_noticed(address)


def test_a_service_that_fails_or_is_not_there_is_no_notice(service):
    address, state = service
    state["status"] = 500
    with pytest.raises(OSError, match="500"):
        is_noticed(address)
    with pytest.raises(OSError, match="refused"):
        is_noticed("http://127.0.0.1:1/latest")


def test_ray_takes_the_command():
    _, name, *words = drain_command("10.0.0.1:6379", "ab12")
    assert name == drain_node.name
    options = drain_node.make_context(name, words).params
    assert (options["address"], options["node_id"]) == ("10.0.0.1:6379", "ab12")
    assert options["deadline_remaining_seconds"] <= 120


class Process:
    def __init__(self, name, *words):
        self.info = {"name": name, "cmdline": [name, *words]}


def test_it_drains_the_node_of_the_raylet_when_the_notice_comes_and_ends_with_ray(service, monkeypatch):
    address, state = service
    processes = [Process("python", "--node_id=no"), Process("raylet", "--x=1", "--node_id=ab12")]
    monkeypatch.setattr(spot_notice.psutil, "process_iter", lambda attributes: processes)
    commands, rounds = [], iter([404, 500, 200])

    def sleep(seconds):
        state["status"] = next(rounds)

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(spot_notice.time, "sleep", sleep)
    monkeypatch.setattr(spot_notice.subprocess, "run", run)
    with pytest.raises(typer.Exit) as end:
        spot_notice.main("10.0.0.1:6379", address)
    assert (end.value.exit_code, commands) == (0, [drain_command("10.0.0.1:6379", "ab12")])
    processes.pop()  # Ray has ended
    spot_notice.main("10.0.0.1:6379", address)
    assert len(commands) == 1
