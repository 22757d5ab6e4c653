"""`--notify URL`: signed messages about a run, by HTTP POST. docs/scoring.md has their schema.

One thread sends them, in order, so that a slow receiver never holds up the job. What goes wrong is said at the end of
the run and never fails it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pyarrow.dataset as pads
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from cluster.storage import is_s3
from glad_core.errors import GladError
from pipelines.runs.claim import Plan
from pipelines.runs.commits import Written
from pipelines.runs.run import Run
from pipelines.runs.schema import RESULTS, RESULTS_SCHEMA
from pipelines.score.record import MOST_READ, worst_images

KEY = "GLAD_NOTIFY_KEY"  # environment variable
SIGNATURE = "X-Glad-Signature"  # header: sha256= and the HMAC-SHA256 of the body in hexadecimal digits
TIMEOUT = (5, 10)  # seconds to connect, and without a byte of the answer
MOST_ALARMS = 100  # images that a message names
LAST_WAIT = 60.0  # seconds for what is still to be sent when the job ends
# A receiver may see a message again whose answer was lost; its `id` is the same. No wait that the receiver chooses.
RETRY = Retry(
    total=3,
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    redirect=False,
    raise_on_status=False,
    respect_retry_after_header=False,
)

Content = Callable[[], dict[str, Any]]


def check_notify(url: str) -> None:
    """Raise a GladError unless messages can be sent to the URL and signed."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits:
        raise GladError("--notify: no URL of a receiver; write https://HOST/PATH")
    if not os.environ.get(KEY):
        raise GladError(f"--notify needs a key to sign its messages: set the environment variable {KEY}")


class Notifier:
    """Sends messages in a thread of its own. After one that was not delivered it tries no others but the last."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key.encode()
        self._queue: SimpleQueue[tuple[Content, bool] | None] = SimpleQueue()
        self._lost, self._sent, self._reason = 0, 0, "no answer in time"
        self._thread = Thread(target=self._work, daemon=True, name="glad-notify")
        self._thread.start()

    def send(self, content: Content, last: bool = False) -> None:
        """Have a message sent; ``content`` is called in the thread."""
        self._queue.put((content, last))

    def close(self) -> str | None:
        """Wait for what is to be sent; one line about what was not."""
        waiting = self._queue.qsize()
        self._queue.put(None)
        self._thread.join(LAST_WAIT)
        lost = self._lost + (max(1, waiting) if self._thread.is_alive() else 0)
        host = urlsplit(self._url).hostname  # the rest of the URL may be a secret
        return f"--notify: {lost} messages were not delivered to {host}: {self._reason}" if lost else None

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            content, last = message
            if self._lost and not last:
                self._lost += 1
                continue
            try:
                post(self._url, self._key, content())
            except Exception as error:  # whatever it is, it must not fail the run
                self._lost += 1
                self._reason = _reason(error)


def alarms_message(run: Run, plan: Plan, commit: Written) -> dict[str, Any]:
    """The content of a message about the images of a commit that were called anomalous."""
    columns = ["image_id", "uri", "category", "score", "threshold"]
    alarms = _results(run, [commit]).head(MOST_ALARMS, columns=columns, filter=pads.field("is_anomalous")).to_pylist()
    content = _about(run, plan, "alarms", f"{plan.run}-{commit.shard}")
    return content | {"alarms": commit.anomalies, "images": alarms}


def complete_message(run: Run, plan: Plan, commits: Sequence[Written]) -> dict[str, Any]:
    """The content of the message about a run that is complete, to which this job has contributed these commits."""
    run = replace(run)  # which has not read run.json yet: an earlier one may have said less
    scored = sum(commit.scored for commit in commits)
    worst = worst_images(run, _results(run, commits)) if scored <= MOST_READ else None
    content = _about(run, plan, "complete", f"{plan.run}-complete-{plan.generation}")
    return content | {"counts": run.record["counts"], "judged": run.record["judged"], "worst": worst}


def _about(run: Run, plan: Plan, event: str, id_: str) -> dict[str, Any]:
    link = run.location if is_s3(run.location) else Path(run.location).as_uri()
    return {"version": 1, "event": event, "id": id_, "run": plan.run, "source": plan.identity["source"], "link": link}


def _results(run: Run, commits: Sequence[Written]) -> pads.Dataset:
    """The results of these commits, which are published."""
    files = [file for commit in commits for file in commit.files if file.startswith(f"{RESULTS}/")]
    if not files:
        return pads.dataset(RESULTS_SCHEMA.empty_table())
    filesystem, _ = run.storage.resolve(run.location)
    paths = [run.storage.resolve(run.path(file))[1] for file in files]
    return pads.dataset(paths, filesystem=filesystem, schema=RESULTS_SCHEMA, format="parquet")


def post(url: str, key: bytes, content: dict[str, Any]) -> None:
    """Send one message.

    Raises:
        GladError: the receiver refuses it. requests.RequestException: it cannot be reached.
    """
    body = json.dumps(content | {"sent": int(time.time())}, allow_nan=False).encode()
    signature = hmac.new(key, body, hashlib.sha256).hexdigest()
    headers = {"Content-Type": "application/json", SIGNATURE: f"sha256={signature}", "User-Agent": "glad"}
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=RETRY))
        answer = session.post(url, body, headers=headers, timeout=TIMEOUT, allow_redirects=False, stream=True)
        if not 200 <= answer.status_code < 300:
            raise GladError(f"it answered {answer.status_code}")


def _reason(error: Exception) -> str:
    """Why, in a line without the URL, which requests puts into its messages."""
    if isinstance(error, GladError):
        return str(error)
    for kind, words in (
        (requests.exceptions.SSLError, "its certificate is not accepted"),
        (requests.exceptions.Timeout, "it does not answer in time"),
        (requests.exceptions.ConnectionError, "it cannot be reached"),
    ):
        if isinstance(error, kind):
            return words
    return type(error).__name__


@contextmanager
def notifying(url: str | None, say: Callable[[str], None]) -> Iterator[Notifier | None]:
    """A notifier for the job within, if there is a URL; says in the end what was not delivered."""
    if url is None:
        yield None
        return
    notifier = Notifier(url, os.environ[KEY])
    try:
        yield notifier
    finally:
        if line := notifier.close():
            say(line)
