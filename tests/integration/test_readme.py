"""The README's blocks marked `sh` do what they say: typed into an empty folder as they stand, on real Ray.

A `glad.yaml` there makes the training short, the model tiny and the views one (a tiny model would cut a board into
hundreds of tiles), and the pictures are few; the commands know nothing of it. They run in this process, as a Ray
session for each would take a minute; so they have to be plain `glad` lines, nothing of a shell.
"""

import re
import shlex
from functools import partial
from inspect import signature
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.demo.boards import DEFECTS, make_demo_data

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_own_dataset_of_the_readme(tmp_path, tiny_bundle, ray_session, monkeypatch) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).splitlines()
    assert len(lines) == 5, "the README promises five commands"
    monkeypatch.chdir(tmp_path)
    usual = {name: value.default for name, value in signature(make_demo_data).parameters.items()}
    assert usual["test_good"] + len(DEFECTS) * usual["per_defect"] == 60, "the README counts them"
    few = partial(make_demo_data, train_good=12, test_good=4, per_defect=2)
    monkeypatch.setattr("pipelines.demo.boards.make_demo_data", few)
    short = {
        "train": {"base": str(tiny_bundle), "steps": 2, "batch-size": 4, "views": "squash"},
        "score": {"actors": 1},
    }
    Path("glad.yaml").write_text(yaml.safe_dump(short))
    for line in lines:
        assert re.fullmatch(r"glad [\w ./-]+", line), f"more than a command and its words: {line}"
        ran = CliRunner().invoke(app, shlex.split(line)[1:])
        assert ran.exit_code == 0, f"{line}\n{ran.output}"
    results = pq.read_table("monday/results")
    pictures = list(Path("pictures/circuit_board/test").rglob("*.png"))
    assert len(results) == len(pictures) == 12
    assert None not in results["is_anomalous"].to_pylist(), "training sets the threshold"
    assert Path("monday.html").read_text().startswith("<!doctype html>")
