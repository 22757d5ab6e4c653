"""Charts written as PNG files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from cluster.storage import Storage, absolute

DOTS_PER_INCH = 110


def save_figure(figure: Figure, out: str, storage: Storage) -> None:
    """Write a figure as PNG, local or s3://, and create its folder if necessary.

    Figures are made with `Figure`, not with pyplot, which would keep each of them and look for a window system.

    Raises:
        StorageError: ``out`` cannot be written.
    """
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DOTS_PER_INCH, format="png")
    storage.write(absolute(out), stream.getvalue())
