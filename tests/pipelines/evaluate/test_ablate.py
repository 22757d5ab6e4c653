import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from glad_core.bundle.glad_json import read_description
from glad_core.bundle.settings import Settings
from pipelines.cli.main import app
from pipelines.evaluate import ablate


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "data" / "part"
    for folder, count in (("train/good", 1), ("test/good", 2), ("test/cut", 2)):
        for number in range(count):
            image = root / folder / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image)
            if folder == "test/cut":
                mask = np.zeros((32, 32), np.uint8)
                mask[4:12, 4:12] = 255
                mask_file = root / "ground_truth/cut" / f"{number}_mask.png"
                mask_file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(mask_file)
    return root


def test_the_rows_are_the_paper_s(tiny_bundle) -> None:
    settings = Settings.parse(read_description(tiny_bundle).settings, "test")
    rows = ablate.rows_of(settings)
    assert [row.trained_with_anomalies for row in rows[:5]] == [False, False, True, True, True]
    assert [settings.model_copy(update=row.changes).delta for row in rows[:3]] == [0, settings.delta, 0]
    assert [row.changes.get("start_step") for row in rows[5:]] == [350, 550, 750, None]
    assert {row.name for row in rows} == {n for table in ablate.published()["ablations"].values() for n in table}


@pytest.mark.slow
def test_rows_are_scored_once_and_a_complete_one_not_again(tmp_path, dataset, tiny_bundle, ray_session, monkeypatch):
    rows_of = ablate.rows_of
    monkeypatch.setattr(ablate, "rows_of", lambda settings: [rows_of(settings)[n] for n in (2, 4, 8)])
    scored = []
    job = ablate.score
    monkeypatch.setattr(ablate, "score", lambda request, console: scored.append(request.out) or job(request, console))
    base = read_description(tiny_bundle).model_id
    command = ["ablate", dataset, "--model", tiny_bundle, "--plain", tiny_bundle]
    command += ["--out", tmp_path / "out", "--seeds", 0]
    outcome = CliRunner().invoke(app, [*map(str, command)])
    assert outcome.exit_code == 0, outcome.output
    assert len(scored) == 2  # the adaptive row is the full one
    values = json.loads((tmp_path / "out/ablation.json").read_text())
    assert values["components: + ADS + ATP with SAFF"] == values["steps: adaptive steps"]
    assert "99.3/98.6" in outcome.stdout
    assert read_description(tiny_bundle).model_id == base  # linked, not changed
    again = CliRunner().invoke(app, [*map(str, command)])
    assert again.exit_code == 0, again.output
    assert len(scored) == 2
    assert json.loads((tmp_path / "out/ablation.json").read_text()) == values
