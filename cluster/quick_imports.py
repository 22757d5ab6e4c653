"""Faster imports of large packages, for processes whose start is mostly imports."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(*absent: str) -> Iterator[None]:
    """Context for importing torch, diffusers and timm, which are 4,000 modules.

    Garbage collection takes a third of that time, so it is off inside, and never visits the imported objects later.
    The packages ``absent`` cannot be imported inside; afterwards they can.
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
