"""Entry point of the `glad` command: from its first moment a signal ends it properly, and its end is quick."""

from __future__ import annotations

import os
import sys
from typing import Any

from pipelines.cli import stopping


def main() -> None:
    """The console script ``glad``."""
    stopping.watch_signals()  # before the imports, which take seconds on a busy machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from pipelines.cli.app import app

        app()
    except SystemExit as end:
        stopping.end(end.code if isinstance(end.code, int) else 0)
    except stopping.Stopped as stop:
        print("stopped", file=sys.stderr)
        stopping.end(stop.code)


def __getattr__(name: str) -> Any:
    """``app``, for those who only want that."""
    if name != "app":
        raise AttributeError(name)
    from pipelines.cli.app import app

    return app
