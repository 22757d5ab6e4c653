"""Marks are kept with a run, and they move the threshold of its bundle."""

import numpy as np
import pytest
from judged_run import make_judged_run
from typer.testing import CliRunner

from glad_core.bundle.glad_json import read_description
from glad_core.errors import GladError
from pipelines.cli.main import app
from pipelines.runs import feedback


@pytest.fixture
def judged(tmp_path, tiny_bundle):
    return make_judged_run(tmp_path / "judged", tiny_bundle)


def test_the_latest_mark_of_a_result_holds_until_it_is_taken_back(judged) -> None:
    run, row = judged.run, judged.rows[0]
    assert feedback.read_marks(run) == []
    with pytest.raises(GladError, match="no feedback there; mark results with `glad view"):
        feedback.require_marks(run)
    feedback.mark(run, row, "confirmed")
    feedback.mark(run, row, "false_alarm")
    (mark,) = feedback.require_marks(run)
    assert {name: mark[name] for name in ("image_id", "uri", "category", "model_id", "verdict")} == {
        "image_id": row["image_id"],
        "uri": row["uri"],
        "category": "bottle",
        "model_id": row["model_id"],
        "verdict": "false_alarm",
    }
    feedback.mark(run, row, None)
    assert feedback.read_marks(run) == []


def test_marks_move_the_threshold(judged, tiny_bundle, tmp_path) -> None:
    alarms = mark_all_alarms(judged, leave_out=1)
    command = ["calibrate", "--run", judged.run.location, "--model", str(tiny_bundle), "--threshold-only", "--feedback"]
    command += ["--target-fpr", "0.05", "--out", str(tmp_path / "bundle")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert f"1 of {len(alarms)} alarms" in refused.stderr
    mark_all_alarms(judged)
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    good = [np.float32(row["score"]) for row in judged.rows if not ("/cut/" in row["uri"] and row["is_anomalous"])]
    threshold = read_description(tmp_path / "bundle").settings["threshold"]
    assert sum(score > threshold for score in good) / len(good) <= 0.05
    assert threshold in good


def mark_all_alarms(judged, leave_out: int = 0) -> list[dict]:
    """Mark the results called anomalous, as a person who knows the truth would; returns all of them."""
    alarms = [row for row in judged.rows if row["is_anomalous"]]
    for row in alarms[leave_out:]:
        feedback.mark(judged.run, row, "confirmed" if "/cut/" in row["uri"] else "false_alarm")
    return alarms
