"""Training jobs side by side: each is a thread that waits for its workers; events about their progress are shown live.

Threads of this one process, since a process for each category would take more memory than a cluster's head has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster import session
from cluster.storage import StorageError
from glad_core.errors import GladError

LINE_EVERY = 10.0  # seconds between two lines of a job, if there is no terminal
LOOK_EVERY = 0.2  # seconds between two looks at what the jobs have sent

Job = Callable[[Any], Any]  # takes the queue of its events; called again, it resumes


def send_event(
    events: Any, name: str, state: str, *, done: int = 0, total: int = 0, note: str = "", warning: str = ""
) -> None:
    """Report what a job is doing, from any process that runs a part of it."""
    events.put({"job": name, "state": state, "done": done, "total": total, "note": note, "warning": warning})


def run_side_by_side(jobs: Mapping[str, Job], parallel: int, console: Console) -> dict[str, Any]:
    """Run jobs in threads, at most ``parallel`` at a time, and show what each is doing.

    A live line per job in a terminal, plain lines otherwise. Returns each job's result, or the exception that ended it.
    """
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[state]}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    outcomes: dict[str, Any] = {}
    latest: dict[str, dict[str, Any]] = {}
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with _says_how_far(latest, len(jobs)), bar as progress:
        bars = {name: progress.add_task(name, total=None, state="waiting", note="") for name in jobs}
        lines = _Lines(console)
        for event in _run_all(jobs, parallel):
            name = event["job"]
            latest[name] = event
            if event["warning"]:
                console.print(f"[yellow]{name}: {escape(event['warning'])}[/yellow]", highlight=False, soft_wrap=True)
            if event["state"] in ("done", "failed"):
                outcomes[name] = event["outcome"]
            progress.update(bars[name], state=event["state"], note=event["note"])
            if event["total"]:  # else the bar stays where its last state left it
                progress.update(bars[name], completed=event["done"], total=event["total"])
            if not console.is_terminal:
                lines.show(event)
    return outcomes


@contextmanager
def _says_how_far(latest: Mapping[str, dict[str, Any]], jobs: int) -> Iterator[None]:
    """A stop learns how far the jobs are by their ``latest`` events, for the line that the command ends with."""
    try:
        yield
    except KeyboardInterrupt as error:
        if jobs > 1:
            finished = sum(event["state"] in ("done", "failed") for event in latest.values())
            error.add_note(f"after {finished} of {jobs} categories")
        elif latest:
            (event,) = latest.values()
            step = f"after step {event['done']} of {event['total']}"
            error.add_note(step if event["total"] else f"at {event['state']}")
        raise


class _Lines:
    """Plain lines for a log: one whenever a job's state changes, and one every `LINE_EVERY` seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.shown: dict[str, tuple[str, float]] = {}  # state and time of each job's last line
        self.first: dict[tuple[str, str], tuple[int, float]] = {}  # by job and state: what was done first, and when

    def show(self, event: dict[str, Any]) -> None:
        name, state, note = event["job"], event["state"], event["note"]
        self.first.setdefault((name, state), (event["done"], time.monotonic()))
        last_state, last_time = self.shown.get(name, ("", 0.0))
        if last_state == state and time.monotonic() - last_time <= LINE_EVERY:
            return
        self.shown[name] = (state, time.monotonic())
        steps = f" {event['done']} of {event['total']}" if event["total"] else ""
        steps += self._time_left(event)
        self.console.print(f"{name}: {state}{steps}{', ' + note if note else ''}", highlight=False)

    def _time_left(self, event: dict[str, Any]) -> str:
        """What is left of the state at the pace so far; empty until there is one."""
        begun, since = self.first[event["job"], event["state"]]
        done = event["done"] - begun
        if done <= 0:
            return ""
        left = (time.monotonic() - since) / done * (event["total"] - event["done"])
        return f", {timedelta(seconds=round(left))} left"


def _run_all(jobs: Mapping[str, Job], parallel: int) -> Iterator[dict[str, Any]]:
    """Run ``jobs`` in threads; yields their events, the last of each job being ``done`` or ``failed``."""
    import ray
    from ray.util.queue import Empty, Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this machine, so that no other's death ends the command.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    events = Queue(actor_options=options)
    waiting, running = list(jobs.items()), {}  # type: ignore[var-annotated]
    while waiting or running:
        while waiting and len(running) < parallel:
            name, job = waiting.pop(0)
            running[name] = _in_thread(job, events)
        time.sleep(LOOK_EVERY)
        # Before the events are taken, so that those of a finished job come before its end.
        finished = [name for name, outcome in running.items() if outcome.done()]
        with suppress(Empty):  # if its process died just now
            yield from events.get_nowait_batch(events.qsize())
        for name in finished:
            outcome = running.pop(name)
            error = outcome.exception()
            if error is None:
                yield _last_event(name, "done", outcome.result())
            else:
                yield _last_event(name, "failed", session.root_cause(error, GladError, StorageError))


def _in_thread(job: Job, events: Any) -> Future[Any]:
    """The result of a job to come. Its thread does not keep the process alive: a stop need not wait for it."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(job(events))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="glad-train").start()
    return outcome


def _last_event(name: str, state: str, outcome: Any) -> dict[str, Any]:
    return {"job": name, "state": state, "done": 0, "total": 0, "note": "", "warning": "", "outcome": outcome}
