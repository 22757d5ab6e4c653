"""Images that end the process which judges them: a memory fault in a kernel cannot be caught, only survived.

A process notes on its machine's disk which images it works on. Started anew, it finds there who was at work when it
died, and judges those one at a time. Who is alone in the process at its death twice is given up.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

DEATHS = 2  # of a process with nothing else at work, until its image is given up


class Suspects:
    """The note of one process. It lives on the disk of its machine, so a lost machine accuses no image.

    Args:
        process: whatever names the process and stays the same when it is started anew; None keeps no note.
    """

    def __init__(self, process: str | None) -> None:
        self.file = None if process is None else Path(tempfile.gettempdir()) / f"glad-{process}.json"
        self.deaths: dict[str, int] = {}  # of the process while this image alone was at work, by image id
        self.at_work: frozenset[str] = frozenset()
        try:
            note = json.loads(self.file.read_text()) if self.file is not None else {}
        except (OSError, ValueError):  # none, or one that a full disk has cut off: nobody is accused
            return
        self.deaths = note.get("deaths", {})
        alone = len(note.get("at_work", ())) == 1
        for image in note.get("at_work", ()):
            self.deaths[image] = self.deaths.get(image, 0) + alone

    def suspected(self, image: str) -> bool:
        """Whether an image was at work when the process died: it is to be judged alone."""
        return image in self.deaths

    def guilty(self, image: str) -> bool:
        """Whether an image is to be given up."""
        return self.deaths.get(image, 0) >= DEATHS

    def note(self, at_work: Collection[str]) -> None:
        """Write down, if it has changed, what is at work from now on."""
        now = frozenset(at_work)
        if self.file is None or now == self.at_work:
            return
        for image in self.at_work - now:  # judged
            self.deaths.pop(image, None)
        self.at_work = now
        if not self.at_work and not self.deaths:
            self.file.unlink(missing_ok=True)
            return
        draft = self.file.with_suffix(".new")
        with suppress(OSError):  # a full disk must not end the process that judges
            draft.write_text(json.dumps({"deaths": self.deaths, "at_work": sorted(self.at_work)}))
            draft.replace(self.file)
