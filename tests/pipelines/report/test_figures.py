from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from glad_core.errors import GladError
from pipelines.report.figures import DOTS_PER_INCH, save_figure


def test_a_figure_is_written_as_png_whatever_the_file_is_called(tmp_path: Path) -> None:
    out = tmp_path / "new" / "figure"
    save_figure(Figure(figsize=(2, 1)), out)
    image = Image.open(out)
    assert (image.format, image.size) == ("PNG", (2 * DOTS_PER_INCH, DOTS_PER_INCH))


def test_a_figure_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GladError, match="choose another --out"):
        save_figure(Figure(), tmp_path / "file" / "figure.png")
