"""How far a job is: a bar in a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console

LINE_EVERY = 10.0  # seconds
SILENCE = 15.0  # seconds without an image until the reason is printed


class Progress:
    """Context manager that shows the totals given to `update`. ``before`` images were done by an earlier attempt.

    ``kept`` images are committed; the user is told if the job is stopped.

    If no image is finished for `SILENCE` seconds, it prints the line that ``waiting_for`` returns, and again whenever
    that line has changed. It prints the lines that ``news`` returns in any case.
    """

    def __init__(
        self,
        console: Console,
        images: int,
        before: int = 0,
        waiting_for: Callable[[], str | None] = lambda: None,
        news: Callable[[], list[str]] = list,
    ) -> None:
        self.console, self.images, self.before = console, images, before
        self.waiting_for, self.news = waiting_for, news
        self.kept = before
        self.started = self.last_line = self.last_image = time.monotonic()
        self.ended = threading.Event()
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn("scoring"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[rate]}"),
            rich_progress.TextColumn("eta"),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[totals]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("scoring", total=images, rate="", totals="")

    def __enter__(self) -> Progress:
        self.bar.start()
        threading.Thread(target=self._explain_silence, daemon=True, name="glad-silence").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.bar.stop()
        if isinstance(error, KeyboardInterrupt):
            error.add_note(f"after {self.kept} of {self.images} images")

    def update(self, done: int, anomalies: int, errors: int) -> None:
        """Show that ``done`` images are finished, ``errors`` of them without a verdict."""
        now = self.last_image = time.monotonic()
        rate = (done - self.before) / max(now - self.started, 1e-9)
        totals = f"{anomalies} anomalies, {errors} errors"
        self.bar.update(self.task, completed=done, rate=f"{rate:.1f} images/s", totals=totals)
        if not self.console.is_terminal and now - self.last_line >= LINE_EVERY:
            self.last_line = now
            left = (self.images - done) / max(rate, 1e-9)
            self.console.print(
                f"{done} of {self.images} images, {rate:.1f} images/s, {left:.0f} s left, {totals}", highlight=False
            )

    def _explain_silence(self) -> None:
        printed = None
        while not self.ended.wait(SILENCE / 4):
            for line in self.news():
                self.console.print(f"{line}; it is started anew, and the others go on", highlight=False, soft_wrap=True)
            if time.monotonic() - self.last_image < SILENCE:
                printed = None
                continue
            reason = self.waiting_for()
            if reason not in (None, printed) and not self.ended.is_set():
                self.console.print(reason, highlight=False, soft_wrap=True)
            printed = reason
