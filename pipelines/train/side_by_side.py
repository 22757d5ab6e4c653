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
MEASURED = 5.0  # seconds after which the time that a state takes is told
# What a state counts, and how many have to be measured: tiles are judged eight at a time and come out together.
# Calibration begins with what takes longest, so its time is a bound.
JUDGE = (24, "tiles of pictures to judge, at most about")
UNITS = {"train": (3, "steps, about"), "calibrate": JUDGE, "choose steps": JUDGE}

Job = Callable[[Any], Any]  # takes the queue of its events; called again, it resumes


def send_event(
    events: Any, name: str, state: str, *, done: int = 0, total: int = 0, note: str = "", warning: str = ""
) -> None:
    """Report what a job is doing, from any process that runs a part of it."""
    events.put({"job": name, "state": state, "done": done, "total": total, "note": note, "warning": warning})


def count_judged(events: Any, name: str, state: str, total: int) -> Callable[[int], None]:
    """What reports that so many more of ``total`` images have been judged."""
    done = 0

    def judged(count: int) -> None:
        nonlocal done
        done += count
        send_event(events, name, state, done=done, total=total)

    judged(0)
    return judged


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
        bars = {name: progress.add_task(escape(name), total=None, state="waiting", note="") for name in jobs}
        pace = Pace()
        lines = _Lines(console, pace)
        for event in _run_all(jobs, parallel):
            name = event["job"]
            latest[name] = event
            if event["warning"]:
                line = f"[yellow]{escape(name)}: {escape(event['warning'])}[/yellow]"
                console.print(line, highlight=False, soft_wrap=True)
            if event["state"] in ("done", "failed"):
                outcomes[name] = event["outcome"]
            if expected := pace.expected(event):
                console.print(f"{name}: {expected}", markup=False, highlight=False, soft_wrap=True)
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


class Pace:
    """How fast each job gets on in each of its states, by the events of `send_event`."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, str], tuple[int, float]] = {}  # by job and state: what was done first, and when
        self.told: set[tuple[str, str]] = set()

    def expected(self, event: dict[str, Any]) -> str:
        """How much a state has to do and about how long it takes: once, as soon as that is measured; else empty."""
        key = event["job"], event["state"]
        if not event["total"]:
            return ""
        begun, since = self.first.setdefault(key, (event["done"], time.monotonic()))
        done, seconds = event["done"] - begun, time.monotonic() - since
        least, words = UNITS.get(event["state"], (event["total"] + 1, ""))
        if key in self.told or done < least or seconds < MEASURED:
            return ""
        self.told.add(key)
        left = f"{event['total'] - begun} of " if begun > 1 else ""  # of a resumed training
        return f"{left}{event['total']} {words} {_about(seconds / done * (event['total'] - begun))}"

    def left(self, event: dict[str, Any]) -> str:
        """The time that is left of the state at the pace so far; empty until that can be told."""
        begun, since = self.first.get((event["job"], event["state"]), (0, 0.0))
        done = event["done"] - begun
        if not event["total"] or done < (JUDGE[0] if UNITS.get(event["state"]) is JUDGE else 1):
            return ""
        left = (time.monotonic() - since) / done * (event["total"] - event["done"])
        return f", {timedelta(seconds=round(left))} left"


def _about(seconds: float) -> str:
    """A time in words, no more exact than it is known."""
    if seconds < 90:
        return f"{max(1, round(seconds / 10)) * 10} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


class _Lines:
    """Plain lines for a log: one whenever a job's state changes, and one every `LINE_EVERY` seconds."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self.console, self.pace = console, pace
        self.shown: dict[str, tuple[str, float]] = {}  # state and time of each job's last line

    def show(self, event: dict[str, Any]) -> None:
        name, state, note = event["job"], event["state"], event["note"]
        last_state, last_time = self.shown.get(name, ("", 0.0))
        if last_state == state and time.monotonic() - last_time <= LINE_EVERY:
            return
        self.shown[name] = (state, time.monotonic())
        steps = f" {event['done']} of {event['total']}" if event["total"] else ""
        steps += self.pace.left(event)
        line = f"{name}: {state}{steps}{', ' + note if note else ''}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


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
