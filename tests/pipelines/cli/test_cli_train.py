import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.train import calibrate, job, retrain


@pytest.fixture
def requests(monkeypatch):
    """Requests of train, retrain and calibrate, which are not carried out; retraining fails for a category."""
    made = []
    monkeypatch.setattr(job, "train", lambda request, console: made.append(request) or "the-model")
    monkeypatch.setattr(job, "describe_end", lambda location: [f"bundle in {location}", "next: glad score"])
    monkeypatch.setattr(retrain, "retrain", lambda request, console: made.append(request))
    monkeypatch.setattr(calibrate, "calibrate", lambda request, console: made.append(request) or "the-model")
    return made


def run(*words):
    return CliRunner().invoke(app, list(words))


def test_train_leaves_to_the_recipe_what_is_not_given(requests):
    outcome = run("train", "mvtec", "--out", "bundle", "--steps", "5", "--optimizer", "muon", "--part", "vae")
    assert (outcome.exit_code, outcome.stdout) == (0, "bundle in bundle\nnext: glad score\n")
    (request,) = requests
    assert (request.part, request.base, request.device, request.workers) == ("vae", "small", None, 1)
    given = {name: value for name, value in request.recipe.items() if value is not None}
    assert given == {"steps": 5, "optimizer": "muon", "seed": 0}


def test_train_options_have_other_names_in_the_recipe(requests):
    run("train", "mvtec", "--out", "bundle", "--precision", "bf16", "--ema", "0.9", "--no-anomalies")
    recipe = requests[0].recipe
    assert (recipe["autocast"], recipe["ema_decay"], recipe["anomaly_probability"]) == ("bf16", 0.9, 0.0)


def test_retrain_ends_with_1_if_a_category_failed(requests):
    outcome = run("retrain", "mvtec", "--out", "models", "--categories", "a,b", "--promote", "never", "--device", "cpu")
    assert outcome.exit_code == 1
    (request,) = requests
    assert (request.promote, request.margin, request.max_parallel) == ("never", 0.02, None)
    assert (request.train.category, request.train.device, request.train.out) == ("a,b", "cpu", "models")


def test_calibrate_takes_either_images_or_a_run(requests):
    for words in ([], ["good", "--run", "results"]):
        outcome = run("calibrate", *words, "--model", "small", "--out", "bundle")
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1)
        assert "give either good images or --run" in outcome.stderr
    assert run("calibrate", "good", "--model", "small", "--out", "b", "--foreground", "2", "--profile", "fast").stdout
    (request,) = requests
    assert (request.source, request.run, request.foreground_mode, request.profile) == ("good", None, 2, "fast")
