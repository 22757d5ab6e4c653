"""`glad retrain --settings`: options of single categories, and its mistakes, one line each, before any work."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from glad_core.bundle.settings import View
from glad_core.errors import GladError
from glad_core.training.recipe import Recipe
from pipelines.cli import category_file
from pipelines.cli.main import app
from pipelines.train import retrain


@pytest.fixture
def requests(monkeypatch):
    made = []
    monkeypatch.setattr(retrain, "retrain", lambda request, console: made.append(request) or True)
    return made


def run(folder: Path, text: str, *words: str):
    (folder / "some.yaml").write_text(text)
    return CliRunner().invoke(
        app, ["retrain", "data", "--out", "models", "--settings", str(folder / "some.yaml"), *words]
    )


def test_each_category_has_its_own_options(tmp_path, requests):
    text = """
categories:
  screw:
    preset: MVTec-AD/screw
    precision: bf16
    learning-rate: 2e-6
    base: s3://models/screw
  grid: {steps: 7, part: dino, anomalies: false, target_fpr: 0.01, gradient_checkpointing: true}
  tile:
"""
    outcome = run(tmp_path, text, "--steps", "5", "--micro-batch", "4", "--optimizer", "muon")
    assert outcome.exit_code == 0, outcome.output
    (request,) = requests
    screw, grid, tile, other = (request.of(name) for name in ("screw", "grid", "tile", "other"))
    recipe = Recipe.parse({name: value for name, value in screw.recipe.items() if value is not None}, "test")
    assert (screw.base, recipe.steps, recipe.foreground_mode) == ("s3://models/screw", 3000, 1)  # as published
    assert (recipe.autocast, recipe.learning_rate) == ("bf16", 2e-6)  # what the file names wins over what is published
    assert (recipe.micro_batch, recipe.optimizer) == (4, "muon")  # and the rest is that of all
    assert (grid.part, grid.target_fpr, grid.recipe["steps"], grid.base) == ("dino", 0.01, 7, "small")
    assert (grid.recipe["anomaly_probability"], grid.recipe["gradient_checkpointing"]) == (0.0, True)
    assert tile == other
    assert (other.recipe["steps"], other.recipe["anomaly_probability"], other.part) == (5, None, "unet")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("categories: {screw: {stepz: 5}}", ("some.yaml: screw: unknown key 'stepz'", "did you mean 'steps'?")),
        ("categories: {screw: {prset: MVTec-AD/screw}}", ("unknown key 'prset'", "did you mean 'preset'?")),
        ("categories: {screw: {workers-per-category: 2}}", ("unknown key 'workers-per-category'",)),
        ("categories: {screw: {out: x}}", ("unknown key 'out'",)),
        ("categories: {screw: {steps: 0}}", ("some.yaml: screw.steps: '0'", "greater than or equal to 1")),
        ("categories: {screw: {steps: many}}", ("screw.steps: 'many'",)),
        ("categories: {screw: {steps: [1, 2]}}", ("screw.steps: '[1, 2]' is not one value",)),
        ("categories: {screw: {steps: true}}", ("screw.steps: 'True' is not one value",)),
        ("categories: {screw: {anomalies: maybe}}", ("screw.anomalies: 'maybe' is not true or false",)),
        ("categories: {screw: {precision: fp8}}", ("screw.precision: 'fp8'", "bf16")),
        ("categories: {screw: {preset: MVTec-AD/scew}}", ("screw.preset: ", "no category 'scew'", "mean 'screw'?")),
        ("categories: {screw: {preset: MVTec/screw}}", ("screw.preset: ", "did you mean 'MVTec-AD'?")),
        ("categories: {screw: {preset: screw}}", ("screw.preset: 'screw' is not DATASET/CATEGORY",)),
        ("categories: {screw: {preset: VisA/pcb1, part: vae}}", ("'preset' is a recipe of the unet",)),
        ("categories: {screw: 5}", ("screw: has to be a table",)),
        ("categories: [screw]", ("'categories' has to be a table",)),
        ("categorys: {screw: {steps: 5}}", ("unknown key 'categorys'", "did you mean 'categories'?")),
        ("- screw", ("it has to be a table",)),
        ("", ("'categories' has to be a table",)),
        ("categories: {screw: {steps: 5}", ("not YAML at line",)),
        ("categories: {screw: {steps: 5}, screw: {steps: 6}}", ("'screw' is there twice",)),
        ("categories:\n  screw:\n    steps: 5\n    steps: 6\n", ("line 4: 'steps' is there twice",)),
    ],
)
def test_a_mistake_is_one_line_before_any_work(tmp_path, requests, text, words):
    outcome = run(tmp_path, text)
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1), outcome.output
    for word in words:
        assert word in outcome.stderr
    assert requests == []


def test_a_file_that_is_not_there_is_named(tmp_path, requests):
    words = ["retrain", "data", "--out", "models", "--settings", str(tmp_path / "other.yaml")]
    outcome = CliRunner().invoke(app, words)
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1)
    assert "other.yaml: no such file; name a YAML file" in outcome.stderr


def test_unknown_categories_and_recipes_that_do_not_fit_are_found_before_any_work(tmp_path, dataset, tiny_bundle):
    def refused(text: str) -> str:
        (tmp_path / "some.yaml").write_text(text)
        words = ["retrain", dataset, "--out", tmp_path / "models", "--base", tiny_bundle, "--categories", "part"]
        outcome = CliRunner().invoke(app, [str(word) for word in [*words, "--settings", tmp_path / "some.yaml"]])
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1), outcome.output
        assert not (tmp_path / "models").exists()
        return outcome.stderr

    message = refused("categories: {prat: {steps: 1}}")
    assert "--settings names a category that there is not" in message
    assert "no category 'prat'; did you mean 'part'?" in message
    # 'other' is one of the dataset's that is not trained now, so the file may name it.
    message = refused("categories: {other: {steps: 1}, part: {learning-rate: 0}}")
    assert "part: " in message
    assert "learning_rate" in message
    assert "part: no bundle" not in message


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("tile", None, None), "there is no 'tile'; did you mean 'tiles'"),
        (("squash,squash", None, None), "each only once"),
        (("squash", 0.5, None), "which --views squash has not"),
        ((None, None, 0.5), "add --views tiles"),
    ],
)
def test_views_that_cannot_be_are_one_line(options, problem):
    with pytest.raises(GladError, match=problem):
        category_file.views(*options)


def test_views_of_options():
    assert category_file.views(None, None, None) is None
    assert category_file.views("squash, tiles", 0.5, None) == (View(), View(kind="tiles", scale=0.5))
