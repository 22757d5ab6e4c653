"""Messages about a run reach a real server, signed, and never fail the run."""

import hashlib
import hmac
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from judged_run import make_judged_run

from glad_core.errors import GladError
from pipelines.runs.claim import find
from pipelines.runs.commits import read_commits
from pipelines.score import notify
from pipelines.score.notify import Notifier, alarms_message, check_notify, complete_message, notifying

KEY = "a key"


class Receiver(ThreadingHTTPServer):
    """Keeps what it gets, and gives its answers in turn, the last one for ever."""

    def __init__(self, *answers):
        self.answers, self.got = list(answers), []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/hook?secret=1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.send_response(answer)
        self.send_header("Location", self.server.url)
        self.send_header("Retry-After", "3600")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    started = []

    def start(*answers):
        started.append(Receiver(*answers))
        threading.Thread(target=started[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(notify, "RETRY", notify.RETRY.new(backoff_factor=0))
    monkeypatch.setenv("GLAD_NOTIFY_KEY", KEY)


def test_a_message_is_signed_and_says_when_it_was_sent(receiver):
    server = receiver(204)
    notifier = Notifier(server.url, KEY)
    notifier.send(lambda: {"event": "alarms", "name": "grün"})
    assert notifier.close() is None
    ((headers, body),) = server.got
    assert headers["X-Glad-Signature"] == f"sha256={hmac.new(KEY.encode(), body, hashlib.sha256).hexdigest()}"
    content = json.loads(body)
    assert abs(content.pop("sent") - time.time()) < 60
    assert content == {"event": "alarms", "name": "grün"}


def test_a_receiver_verifies_it_as_the_documentation_shows(receiver):
    page = (Path(__file__).parents[3] / "docs/scoring.md").read_text()
    names = {}
    exec(re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1], names)
    server = receiver(200)
    notify.post(server.url, KEY.encode(), {"id": 1})
    ((headers, body),) = server.got
    signature = headers[notify.SIGNATURE]
    assert names["verified"](body, signature, KEY.encode())["id"] == 1
    assert names["verified"](body, signature, b"another") is None
    assert names["verified"](body + b" ", signature, KEY.encode()) is None
    old = json.dumps({"sent": time.time() - 3600}).encode()
    signature = f"sha256={hmac.new(KEY.encode(), old, hashlib.sha256).hexdigest()}"
    assert names["verified"](old, signature, KEY.encode()) is None


def test_a_server_that_is_busy_gets_the_same_message_again(receiver):
    server = receiver(503, 429, 200)
    notifier = Notifier(server.url, KEY)
    notifier.send(lambda: {"id": 1})
    assert notifier.close() is None
    assert len({body for _, body in server.got}) == 1
    assert len(server.got) == 3


@pytest.mark.parametrize(("answer", "tries"), [(500, 4), (404, 1), (302, 1), (301, 1)])
def test_a_refusal_is_one_line_without_the_url_s_secret_and_only_the_last_message_is_tried(receiver, answer, tries):
    server, lines = receiver(answer), []
    with notifying(server.url, lines.append) as notifier:
        for number in range(3):
            notifier.send(lambda number=number: {"id": number})
        notifier.send(lambda: {"id": "last"}, last=True)
    assert lines == [f"--notify: 4 messages were not delivered to 127.0.0.1: it answered {answer}"]
    assert [json.loads(body)["id"] for _, body in server.got] == [0] * tries + ["last"] * tries


def test_nobody_there_a_silent_server_and_results_that_are_gone_are_lines_too(receiver, monkeypatch):
    server = receiver(200)
    server.shutdown()
    monkeypatch.setattr(notify, "TIMEOUT", (1, 0.1))
    monkeypatch.setattr(notify, "RETRY", notify.RETRY.new(total=0))
    silent = Notifier(server.url, KEY)
    silent.send(lambda: {})
    assert "it cannot be reached" in silent.close() or "in time" in silent.close()
    server.server_close()
    gone = Notifier(server.url, KEY)
    gone.send(lambda: {})
    assert gone.close() == "--notify: 1 messages were not delivered to 127.0.0.1: it cannot be reached"
    broken = Notifier(server.url, KEY)
    broken.send(lambda: {}["no such key"])
    assert broken.close().endswith(": KeyError")


def test_a_receiver_that_takes_for_ever_does_not_hold_up_the_end(receiver, monkeypatch):
    monkeypatch.setattr(notify, "LAST_WAIT", 0.05)
    wait = threading.Event()
    notifier = Notifier(receiver(200).url, KEY)
    notifier.send(lambda: {"late": wait.wait(5)})
    assert notifier.close() == "--notify: 1 messages were not delivered to 127.0.0.1: no answer in time"
    wait.set()


@pytest.mark.parametrize("url", ["", "hook", "ftp://a/b", "http://", "https:///x", "http://[::1", "http://a:x/"])
def test_what_is_no_url_is_refused_before_the_run(url):
    with pytest.raises(GladError, match="--notify: no URL of a receiver"):
        check_notify(url)


def test_without_a_key_nothing_is_started(monkeypatch):
    check_notify("https://example.com/hook")
    monkeypatch.delenv("GLAD_NOTIFY_KEY")
    with pytest.raises(GladError, match="GLAD_NOTIFY_KEY"):
        check_notify("https://example.com/hook")


def test_messages_hold_what_the_documentation_says(tmp_path, tiny_bundle):
    judged = make_judged_run(tmp_path, tiny_bundle)
    run, plan = judged.run, find(judged.run).plan
    plan.identity["source"] = "/photos"
    record = run.record | {"judged": 61}
    run.storage.write(run.path("run.json"), json.dumps(record).encode())
    commits = list(read_commits(run, plan).values())
    message = complete_message(run, plan, commits)
    assert {"version", "event", "id", "run", "source", "link", "counts", "judged", "worst"} == message.keys()
    margin = {row["uri"]: row["score"] / row["threshold"] for row in judged.rows}
    assert [image["uri"] for image in message["worst"]] == sorted(margin, key=lambda uri: -margin[uri])[:5]
    assert message["link"].startswith("file:///")
    for commit in commits:
        message = alarms_message(run, plan, commit)
        assert message["alarms"] == len(message["images"]) == commit.anomalies
        assert all(image["score"] > image["threshold"] for image in message["images"])
    json.dumps(message, allow_nan=False)
