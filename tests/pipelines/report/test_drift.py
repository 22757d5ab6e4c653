import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.runs.schema import RESULTS_SCHEMA


def finished(folder: Path, seed: int, shift: float = 0.0, late: float = 0.5, category: str = "bolt") -> Path:
    """A run of 300 images whose scores are normal and which stop at one of two steps."""
    rng = np.random.default_rng(seed)
    rows = [
        {"image_id": f"{seed}-{n}", "category": category, "score": float(rng.normal() + shift)}
        | {"stop_step": 300 if rng.random() < late else 480}
        for n in range(300)
    ]
    (folder / "results").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA), folder / "results/part-0.parquet")
    (folder / "run.json").write_text(json.dumps({"models": {}}))
    return folder


def drift(*arguments):
    return CliRunner().invoke(app, ["drift", *map(str, arguments)])


def test_alike_runs_are_told_from_shifted_ones(tmp_path: Path) -> None:
    calm = finished(tmp_path / "a", 10)
    alike = drift(calm, finished(tmp_path / "b", 11), "--out", tmp_path / "plot.png")
    assert alike.exit_code == 0, alike.output
    assert "alike" in alike.stdout
    assert Image.open(tmp_path / "plot.png").size[0] > 500
    assert drift(calm, finished(tmp_path / "c", 2, shift=0.5)).exit_code == 1
    steps = drift(calm, finished(tmp_path / "d", 3, late=0.75))
    assert steps.exit_code == 1
    assert "differs" in steps.stdout
    as_json = drift(calm, tmp_path / "c", "--json")
    assert as_json.exit_code == 1
    found = json.loads(as_json.stdout)["bolt"]  # the table goes to stderr
    assert found["differs"] is True
    assert found["images"] == [300, 300]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", 0)
    for other, words in ((tmp_path, "no finished run"), (finished(tmp_path / "b", 1, category="nut"), "no category")):
        outcome = drift(run, other)
        assert outcome.exit_code == 2
        assert words in outcome.stderr
        assert outcome.stderr.count("\n") == 1
