"""`glad train` as a user runs it: real Ray Train, a tiny bundle, real files."""

import io
import queue
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from glad_core.bundle.glad_json import verify
from glad_core.bundle.model import load_bundle
from pipelines.cli.main import app
from pipelines.train import job
from pipelines.train.survey import Survey


def command(dataset: Path, base: Path, out: Path | str, steps: int, *more: object, category: str = "part") -> list[str]:
    options = ["--base", base, "--out", out, "--steps", steps, "--batch-size", 2, "--learning-rate", 1e-4, *more]
    return ["train", str(dataset), "--category", category, *map(str, options)]


def invoke(*arguments: object) -> str:
    outcome = CliRunner().invoke(app, [*map(str, arguments)])
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def test_what_the_survey_of_the_pictures_found_is_said(monkeypatch):
    found = Survey([], [], [], [], "f", [], peaks=[3000.0], paged=["/a.tif", "/b.tif"])
    monkeypatch.setattr(job, "survey", lambda *arguments: found)
    monkeypatch.setattr(job, "describe", lambda *arguments: SimpleNamespace(settings={"resolution": 32}))
    events = queue.Queue()
    assert job._survey(SimpleNamespace(name="n", base="b", storage=None, kept_bytes=0), {}, events) is found
    warnings = [event["warning"] for event in events.queue if event["warning"]]
    assert warnings == [
        "2 files with further pages, such as /a.tif: training takes the first page of each",
        "pictures of more than 8 bits, the brightest value 3000: 4095 is taken for white",
    ]


@pytest.mark.slow
def test_one_model_for_several_categories_that_judges_tiles(tmp_path, preset_bundle, ray_session):
    rng = np.random.default_rng(4)
    for name in ("part", "other"):
        good = tmp_path / "set" / name / "train/good"
        good.mkdir(parents=True)
        (tmp_path / "set" / name / "test").mkdir()
        for number in range(4):
            Image.fromarray(rng.integers(90, 160, (64, 96, 3), dtype=np.uint8)).save(good / f"{number}.png")
    out = tmp_path / "both"
    tiles = ["--views", "tiles", "--scale", 0.5, "--overlap", 0]
    # Adaptive steps, since the nearest good patches have no reconstruction.
    invoke(*command(tmp_path / "set", preset_bundle, out, 5, *tiles, category="all"))
    description = verify(out)
    assert description.category == "other,part"
    assert set(description.settings["thresholds"]) == {"other", "part"}
    assert description.settings["picture_size"] == [64, 96]
    (view,) = description.settings["views"]
    assert (view["kind"], view["scale"], view["overlap"]) == ("tiles", 0.5, 0)
    model = load_bundle(out)
    assert not (model.prompts["other"] == model.prompts["part"]).all()

    archive = tmp_path / "archive"
    picture = rng.integers(0, 256, (100, 50, 3), dtype=np.uint8)
    for name in ("part/a", "part/moved/b", "other/a", "unknown/a"):
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(archive / f"{name}.png")
    invoke("score", archive, "--model", out, "--out", tmp_path / "run", "--reconstructions", "--actors", 1)
    found = pq.read_table(tmp_path / "run" / "results").to_pylist()
    rows = {Path(row["uri"]).relative_to(archive).as_posix(): row for row in found}
    assert set(rows) == {"part/a.png", "part/moved/b.png", "other/a.png"}
    for row in rows.values():
        assert row["threshold"] == pytest.approx(description.settings["thresholds"][row["category"]])
        assert row["p_value"] == pytest.approx(model.p_value(row["score"], row["category"]))
        assert len(row["tiles"]) == 2
        assert np.asarray(Image.open(io.BytesIO(row["reconstruction"]))).shape == (50, 25, 3)
    for name in ("score", "stop_step", "anomaly_map", "steps", "tiles"):  # the same picture: the same verdict
        assert rows["part/a.png"][name] == rows["part/moved/b.png"][name]
    (error,) = pq.read_table(tmp_path / "run" / "errors").to_pylist()
    assert error["error_type"] == "no_model"
    assert "unknown" in error["message"]


def refused(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


def test_mistakes_are_one_line(tmp_path, dataset, tiny_bundle):
    def train(*arguments):
        return CliRunner().invoke(app, ["train", *map(str, arguments)])

    out = tmp_path / "out"
    rest = ["--base", tiny_bundle, "--out", out]
    (tmp_path / "empty").mkdir()
    refused(train(dataset, "--category", "prat", *rest), "no category 'prat'", "did you mean 'part'")
    refused(train(dataset, *rest), "holds 2 categories", "--category")
    refused(train(tmp_path / "nowhere", *rest), "no such dataset folder")
    refused(
        train(tmp_path / "empty", *rest),
        "no pictures directly in it, and no dataset; expected are good pictures, or CATEGORY/train/good",
    )
    part = [dataset, "--category", "part"]
    refused(train(*part, "--base", tmp_path / "empty", "--out", out), "not a GLAD bundle")
    refused(train(*part, "--base", tiny_bundle, "--out", tiny_bundle), "already exists")
    refused(train(*part, "--textures", tmp_path / "empty", *rest), "no texture images")
    refused(train(*part, "--workers", 3, "--batch-size", 4, *rest), "--batch-size 4", "3 workers")
    refused(train(*part, "--optimizer", "adamw8bit", *rest), "pip install bitsandbytes")
    refused(train(*part, "--learning-rate", 0, *rest), "learning_rate: Input should be greater than 0")

    few = tmp_path / "few" / "train" / "good"
    few.mkdir(parents=True)
    (few / "a.png").write_bytes(b"not an image")
    refused(train(few.parents[1], *rest), "1 good images", "two are needed")
    assert not out.exists()


@pytest.mark.slow
def test_what_ray_has_to_find_out_is_one_line_too(tmp_path, dataset, tiny_bundle, ray_session):
    broken = tmp_path / "broken" / "train" / "good"
    broken.mkdir(parents=True)
    for number in range(3):
        (broken / f"{number}.png").write_bytes(b"not an image")
    (broken / "3.png").write_bytes((dataset / "part/train/good/000.png").read_bytes())
    rest = ["--base", str(tiny_bundle), "--out", str(tmp_path / "out"), "--steps", "3", "--batch-size", "2"]
    outcome = CliRunner().invoke(app, ["train", str(tmp_path / "broken"), *rest])
    refused(outcome, "1 readable good images", "0.png", "not PNG")

    refused(
        CliRunner().invoke(
            app, ["train", str(dataset), "--category", "part", *rest, "--workers", "2", "--device", "cuda"]
        ),
        "GPUs",
    )
    (tmp_path / "broken" / "train" / "good" / "4.png").write_bytes((dataset / "part/train/good/001.png").read_bytes())
    outcome = CliRunner().invoke(app, ["train", str(tmp_path / "broken"), *rest, "--learning-rate", "1e30"])
    refused(outcome, "diverged at step", "--learning-rate")
    assert "2.png: not PNG" in outcome.stdout
    assert "skipped" in outcome.stdout
    refused(CliRunner().invoke(app, ["train", str(tmp_path / "broken"), *rest]), "another run", "recipe")
