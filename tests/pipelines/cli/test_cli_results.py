import json

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.evaluate import ablate


def glad(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(("differs", "code"), [(True, 1), (False, 0)])
def test_drift_ends_with_1_if_a_category_differs(monkeypatch, differs, code):
    comparison = {"nut": {"differs": False}, "bolt": {"differs": differs}}
    monkeypatch.setattr("pipelines.report.drift.drift", lambda *runs, **options: comparison)
    outcome = glad("drift", "one", "two", "--json")
    assert outcome.exit_code == code
    assert json.loads(outcome.stdout) == comparison


def test_ablate_takes_whole_numbers_as_seeds(monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "ablate", lambda *values: calls.append(values))
    words = ["ablate", "mvtec", "--model", "a", "--plain", "b", "--out", "c", "--seeds"]
    assert glad(*words, "3,4").exit_code == 0
    assert calls[0][4] == [3, 4]
    wrong = glad(*words, "3;4")
    assert wrong.exit_code == 2
    assert "give whole numbers with commas between" in wrong.stderr


def test_a_dataset_with_problems_ends_with_1(tmp_path):
    broken = tmp_path / "nut/train/good/0.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no picture")
    (tmp_path / "nut/test/good").mkdir(parents=True)
    outcome = glad("datasets", "check", tmp_path, "--json")
    assert outcome.exit_code == 1
    report = json.loads(outcome.stdout)
    assert report["categories"]["nut"]["train good"] == 1
    assert "0.png" in report["problems"][0]
