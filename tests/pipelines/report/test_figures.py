from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from cluster.storage import Storage, StorageError
from pipelines.report.figures import DOTS_PER_INCH, save_figure


def test_a_figure_is_written_as_png_whatever_the_file_is_called(tmp_path: Path) -> None:
    out = tmp_path / "new" / "figure"
    save_figure(Figure(figsize=(2, 1)), str(out), Storage())
    image = Image.open(out)
    assert (image.format, image.size) == ("PNG", (2 * DOTS_PER_INCH, DOTS_PER_INCH))


def test_a_figure_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="choose another folder"):
        save_figure(Figure(), str(tmp_path / "file" / "figure.png"), Storage())
