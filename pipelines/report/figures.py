"""Charts written as PNG files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from glad_core.errors import GladError

DOTS_PER_INCH = 110


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure as PNG and create its folder if necessary.

    Figures are made with `Figure`, not with pyplot, which would keep each of them and look for a window system.

    Raises:
        GladError: ``out`` cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=DOTS_PER_INCH, format="png")
    except OSError as error:
        raise GladError(f"{out}: {error.strerror or error}; choose another --out") from error
