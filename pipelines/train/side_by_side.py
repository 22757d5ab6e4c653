"""Jobs side by side: each a Ray task that says what it is doing, all of them shown live."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster import session
from cluster.storage import StorageError
from glad_core.errors import GladError

MAX_RETRIES = 8  # of a job whose node died
LINE_EVERY = 10.0  # seconds between two lines of a job where there is no terminal

Job = Callable[[Any], Any]  # called with the queue of its events; a job begins again where it was


def tell(
    events: Any, name: str, state: str, *, done: int = 0, total: int = 0, note: str = "", warning: str = ""
) -> None:
    """Say what a job is doing, from wherever a part of it runs."""
    events.put({"job": name, "state": state, "done": done, "total": total, "note": note, "warning": warning})


def follow(jobs: Mapping[str, Job], parallel: int, console: Console) -> dict[str, Any]:
    """Run jobs as Ray tasks, at most ``parallel`` at a time, and show what each is doing.

    A live line per job in a terminal, plain lines otherwise. Returns each one's result, or the exception it failed
    with.
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
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        lines = {name: progress.add_task(name, total=None, state="waiting", note="") for name in jobs}
        shown: dict[str, tuple[str, float]] = {}
        for event in _run_all(jobs, parallel):
            name, state = event["job"], event["state"]
            if event.get("warning"):
                console.print(f"[yellow]{name}: {escape(event['warning'])}[/yellow]", highlight=False, soft_wrap=True)
            if state in ("done", "failed"):
                outcomes[name] = event["outcome"]
            done, total, note = event.get("done", 0), event.get("total") or None, event.get("note", "")
            progress.update(lines[name], completed=done, total=total, state=state, note=note)
            before, when = shown.get(name, ("", 0.0))
            if not console.is_terminal and (before != state or time.monotonic() - when > LINE_EVERY):
                shown[name] = (state, time.monotonic())
                steps = f" {done} of {total}" if total else ""
                console.print(f"{name}: {state}{steps}{', ' + note if note else ''}", highlight=False)
    return outcomes


def _run_all(jobs: Mapping[str, Job], parallel: int) -> Iterator[dict[str, Any]]:
    """Run ``jobs`` as Ray tasks; yields their events, each job's last one being ``done`` or ``failed``."""
    import ray
    from ray.util.queue import Empty, Queue

    # The task itself waits for others most of the time. Its node may die: it goes on from its checkpoint elsewhere.
    task = ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_call)
    events = Queue(actor_options={"num_cpus": 0})
    waiting, running = list(jobs.items()), {}  # type: ignore[var-annotated]
    while waiting or running:
        while waiting and len(running) < parallel:
            name, job = waiting.pop(0)
            running[task.remote(job, events)] = name
        try:
            yield events.get(timeout=0.2)
            continue
        except Empty:
            pass
        for ref in ray.wait(list(running), timeout=0)[0]:
            name = running.pop(ref)
            try:
                yield {"job": name, "state": "done", "outcome": ray.get(ref)}
            except Exception as error:
                yield {"job": name, "state": "failed", "outcome": session.root_cause(error, GladError, StorageError)}


def _call(job: Job, events: Any) -> Any:
    return job(events)
