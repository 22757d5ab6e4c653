"""Ctrl-C, SIGTERM and SIGHUP end a command at any moment, with the exit code that a shell gives: 128 + the signal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0  # seconds from a signal to the end of the command, if what it does cannot be interrupted
SAME = 0.2  # seconds in which a second signal is the same Ctrl-C, passed on by a parent process


class Stopped(KeyboardInterrupt):
    """A signal came. Whoever knows how far the work is adds a note (`add_note`), which the user gets to see."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextlib.contextmanager
def says_if_stopped(advice: str) -> Iterator[None]:
    """Adds to the line that a stopped command ends with."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(advice)
        raise


def watch_signals() -> None:
    """From now on a signal raises `Stopped` in the main thread; a second one ends the process at once.

    Python runs a signal's handler between two of its own instructions, but this process may wait for minutes in the
    middle of one, for storage or for Ray. So a thread looks on, and ends the process when `GRACE` is over.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # of nohup, or of a shell's background job
            signal.signal(number, _stop)
    threading.Thread(target=_look_on, args=(reading,), daemon=True, name="glad-signals").start()


def _stop(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        if signal.getsignal(other) is _stop:
            signal.signal(other, _leave_to_thread)
    raise Stopped(number)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Let the work end in peace: it is being stopped already."""


def _look_on(reading: int) -> None:
    number = _next_signal(reading, None)
    first = time.monotonic()
    while (left := first + GRACE - time.monotonic()) > 0:
        if _next_signal(reading, left) is not None and time.monotonic() - first > SAME:
            break
    else:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), b"stopped\n")
    os._exit(128 + (number or 0))


def _next_signal(reading: int, seconds: float | None) -> int | None:
    """The next of `SIGNALS`; None if there is none in time."""
    while select.select([reading], [], [], seconds)[0]:
        number = os.read(reading, 1)[0]
        if number in SIGNALS:
            return number
    return None


def end(code: int) -> NoReturn:
    """End this process, whatever threads of Ray still run or wait."""
    session: Any = sys.modules.get("cluster.session")
    if session is not None:
        session.disconnect()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that its reader has closed
            stream.flush()
    os._exit(code)
