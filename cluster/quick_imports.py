"""Large packages imported in less time, in processes that have little else to do before they are of use."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(*absent: str) -> Iterator[None]:
    """Import inside it what a process needs: torch, diffusers and timm are 4,000 modules.

    Looking for garbage among them takes a third of the time, so nobody looks, and what is there afterwards is never
    looked at again. The packages ``absent`` are not found inside; later they can be imported as ever.
    """
    hidden = [name for name in absent if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        gc.freeze()
        if collects:
            gc.enable()
