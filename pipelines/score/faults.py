"""Processes of a job that cannot go on: a machine without a driver, a full disk, a role that is missing on one node.

One such process must not end a night's job. It says why, waits, and ends, and Ray starts it anew, on another machine if
there is room. The job stops only if nobody else gets on.
"""

from __future__ import annotations

import os
import time
from typing import Any, NoReturn

from cluster.storage import StorageError
from glad_core.errors import GladError

TRIES = 3  # starts of a process that fail one after the other before the job may stop for it
SILENCE = 600.0  # seconds without an image judged, after which the other processes count as stuck
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0  # seconds before the next start


class Faults:
    """A Ray actor of each job, told by its processes how they fare.

    A process is named by its stage and whatever stays the same when it is started anew.
    """

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}  # by process, one after the other; 0 for one that starts or works
        self.judged = time.monotonic()
        self.printed: set[str] = set()
        self.news: list[str] = []

    def starts(self, process: str) -> None:
        """A process starts, perhaps anew."""
        self.failures.setdefault(process, 0)

    def works(self, process: str) -> None:
        """A process is ready, or has judged images."""
        self.failures[process] = 0
        self.judged = time.monotonic()

    def fails(self, process: str, what: str) -> float | None:
        """A process cannot go on; ``what`` says where and why.

        Returns:
            Seconds until it should end to be started anew; None if the job should stop.
        """
        failures = self.failures[process] = self.failures.get(process, 0) + 1
        if what not in self.printed:
            self.printed.add(what)
            self.news.append(what)
        stuck = 0 not in self.failures.values() or time.monotonic() - self.judged > SILENCE
        if failures >= TRIES and stuck:
            return None
        return min(LONGEST_WAIT, FIRST_WAIT * 3 ** (failures - 1))

    def take_news(self) -> list[str]:
        """What has failed since the last call, a line each."""
        news, self.news = self.news, []
        return news


def start_faults() -> Any:
    """The handle of a new `Faults`; it lives as long as somebody refers to it."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Faults).remote()


def news(faults: Any) -> list[str]:
    """What has failed since the last call, a line each; nothing if Ray does not answer."""
    import ray

    try:
        found: list[str] = ray.get(faults.take_news.remote(), timeout=5)
    except Exception:  # a missing line in the log is no reason to fail
        return []
    return found


def step_aside(faults: Any, stage: str, process: str, error: Exception) -> NoReturn:
    """End this process for Ray to start it anew, here or elsewhere, with what it was working on.

    Args:
        stage: what kind of process it is, for people; ``process`` names it among those.

    Raises:
        GladError, StorageError: the job should stop, since no process gets on.
    """
    import ray

    what = f"{stage} on {ray.util.get_node_ip_address()} cannot go on: {reason_of(error)}"
    wait = ray.get(faults.fails.remote(f"{stage} {process}", what))
    if wait is None:
        kind = StorageError if isinstance(error, StorageError) else GladError
        raise kind(f"{what}; nor can any other process of the job: mend it and give the same command again") from error
    time.sleep(wait)
    os._exit(1)


def reason_of(error: BaseException) -> str:
    """An exception as one line of at most 500 characters."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, GladError | StorageError) else f"{type(error).__name__}: {text}"
