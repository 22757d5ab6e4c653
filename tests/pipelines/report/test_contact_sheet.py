"""`glad show` draws the highest scores, and says in words why an image has no picture."""

import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from judged_run import make_judged_run
from PIL import Image
from rich.console import Console

from cluster.storage import Storage
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.report.contact_sheet import _input, highest, show, stop_label
from pipelines.runs.schema import RESULTS_SCHEMA


def test_highest_scores_first_and_ties_by_image_id() -> None:
    scores = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.0, "e": 0.5}
    rows = [{"image_id": name, "score": score} for name, score in scores.items()]
    results = pads.dataset(pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA))
    assert [row["image_id"] for row in highest(results, 3)[0]] == ["b", "d", "c"]
    assert [row["image_id"] for row in highest(results, 9)[0]] == ["b", "d", "c", "a", "e"]


def test_stop_labels() -> None:
    assert stop_label(350, "difference") == "step 350: difference"
    assert stop_label(150, "min_step") == "step 150: no difference"
    assert stop_label(None, "none") == stop_label(None, None) == "not compared"


def test_a_further_page_is_drawn(tmp_path) -> None:
    frames = [Image.new("L", (9, 9), level) for level in (10, 200)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    row = {"uri": str(tmp_path / "stack.tif"), "size": None}
    assert _input(row, Storage(), Settings()).mean() == 10
    assert _input(row | {"page": 2}, Storage(), Settings()).mean() == 200


def test_a_sheet_has_two_images_in_a_row(tmp_path, tiny_bundle) -> None:
    run, _, rows = make_judged_run(tmp_path, tiny_bundle)
    show(run.location, 5, str(tmp_path / "five.png"), Console(quiet=True))
    show(run.location, 1, str(tmp_path / "one.png"), Console(quiet=True))
    five, one = (Image.open(tmp_path / name).size for name in ("five.png", "one.png"))
    assert five == (2 * one[0], 3 * one[1])
    show(run.location, 200, str(tmp_path / "all.png"), Console(quiet=True))  # one source is lost
    assert Image.open(tmp_path / "all.png").size[1] == len(rows) // 2 * one[1]
    with pytest.raises(GladError, match="no finished run"):
        show(str(tmp_path), 5, str(tmp_path / "none.png"), Console(quiet=True))
