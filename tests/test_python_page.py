"""docs/python.md and docs/detector.ipynb: their code runs as it stands, from top to bottom."""

import json
import re
import shutil
from pathlib import Path

import matplotlib
import pytest
from judged_run import make_judged_run

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    return tmp_path


def test_the_page_s_examples_run(folder: Path, tiny_bundle: Path, photos: Path, capsys) -> None:
    shutil.copytree(tiny_bundle, folder / "board")
    shutil.copy(next(photos.rglob("*.png")), folder / "photo.png")
    make_judged_run(folder / "judged", tiny_bundle)
    (folder / "judged/run").rename("monday")
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    verdict, frame, worst = names["verdict"], names["frame"], names["worst"]
    assert capsys.readouterr().out.startswith(f"{verdict.score} {verdict.threshold} {verdict.is_anomalous}\n")
    assert frame.score.iloc[0] == worst["score"] == frame.score.max()
    assert names["heat_map"].ndim == 2
    assert len(names["errors"].columns) == 5
    assert (folder / "verdict.png").stat().st_size > 1000


def test_the_tutorial_s_five_lines_give_a_verdict(folder: Path, tiny_bundle: Path, photos: Path, capsys) -> None:
    """`tests/test_site.py` holds its commands to the README's."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(block.split("\n\n")) == 2, "five lines with an empty one"
    shutil.copytree(tiny_bundle, folder / "board")
    scratch = folder / "pictures/circuit_board/test/scratch"
    scratch.mkdir(parents=True)
    shutil.copy(next(photos.rglob("*.png")), scratch / "000.png")
    names: dict[str, object] = {}
    exec(block, names)
    verdict = names["verdict"]
    shown = (verdict.score, verdict.threshold, verdict.is_anomalous, verdict.p_value)
    assert capsys.readouterr().out == " ".join(map(str, shown)) + "\n"


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs_and_holds_no_outputs(folder: Path) -> None:
    notebook = json.loads((DOCS / "detector.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, object] = {}
    for cell in cells:
        exec(cell, names)
    verdicts, worst = names["verdicts"], names["worst"]
    assert {verdict.is_anomalous for verdict in verdicts} == {True, False}
    assert "good" not in worst.name.split("/")
