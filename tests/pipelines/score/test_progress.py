import io
import time

import pytest
from rich.console import Console

from pipelines.score import progress


def test_silence_is_explained_once_per_reason_and_images_end_it(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.08)
    reasons = iter(["no machine yet", "no machine yet", None, "the start failed"])
    console = Console(file=io.StringIO(), width=200)
    with progress.Progress(console, 10, waiting_for=lambda: next(reasons, "the start failed")) as shown:
        deadline = time.monotonic() + 10
        while "failed" not in console.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        shown.update(10, 0, 0)
    assert console.file.getvalue().splitlines() == ["no machine yet", "the start failed"]


def test_images_that_come_are_not_asked_about(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.2)
    asked = []
    with progress.Progress(Console(file=io.StringIO()), 10, waiting_for=lambda: asked.append(1)) as shown:
        for image in range(10):
            shown.update(image, 0, 0)
            time.sleep(0.05)
    assert not asked


def test_a_stop_learns_how_many_images_are_kept():
    shown = progress.Progress(Console(file=io.StringIO()), 10, before=4)
    shown.kept += 3
    with pytest.raises(KeyboardInterrupt) as stop, shown:
        raise KeyboardInterrupt
    assert stop.value.__notes__ == ["after 7 of 10 images"]
