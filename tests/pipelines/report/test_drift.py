"""Runs over like images are alike; shifted scores or stop steps are reported to differ."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.report.drift import NO_STEP, compare, read_columns
from pipelines.runs.run import Run
from pipelines.runs.schema import RESULTS_SCHEMA


def finished(
    folder: Path, seed: int, shift: float = 0.0, late: float | None = 0.5, category: str | None = "bolt"
) -> Path:
    """A run of 300 images with normal scores; ``late`` of them stop at step 300, the others at 480, if any stops."""
    rng = np.random.default_rng(seed)
    rows = [
        {"image_id": f"{seed}-{n}", "category": category, "score": float(rng.normal() + shift)}
        | {"stop_step": None if late is None else 300 if rng.random() < late else 480}
        for n in range(300)
    ]
    (folder / "results").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA), folder / "results/part-0.parquet")
    (folder / "run.json").write_text(json.dumps({"models": {}}))
    return folder


def drift(*arguments):
    return CliRunner().invoke(app, ["drift", *map(str, arguments)])


def test_alike_runs_are_alike_and_shifted_ones_differ(tmp_path: Path) -> None:
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
    comparison = json.loads(as_json.stdout)["bolt"]  # the table goes to stderr
    assert comparison["differs"] is True
    assert comparison["images"] == [300, 300]


def test_p_values_are_multiplied_by_the_number_of_tests() -> None:
    one, other = ({"score": np.linspace(low, low + 1, 200), "step": np.full(200, 300)} for low in (0, 0.2))
    single, several = (compare(one, other, tests, alpha=0.01) for tests in (1, 40))
    assert several["p_scores"] == pytest.approx(40 * single["p_scores"])
    assert single["p_stop_steps"] == several["p_stop_steps"] == 1
    assert (single["differs"], several["differs"]) == (True, False)


def test_results_without_category_or_stop_step_are_compared_too(tmp_path: Path) -> None:
    columns, _ = read_columns(Run.at(str(finished(tmp_path / "a", 0, category=None, late=None))))
    assert list(columns) == ["(none)"]
    assert set(columns["(none)"]["step"]) == {NO_STEP}
    assert len(columns["(none)"]["score"]) == 300


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", 0)
    for other, words in ((tmp_path, "no finished run"), (finished(tmp_path / "b", 1, category="nut"), "no category")):
        outcome = drift(run, other)
        assert outcome.exit_code == 2
        assert words in outcome.stderr
        assert outcome.stderr.count("\n") == 1
