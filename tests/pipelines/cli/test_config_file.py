import json

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app


def glad(*arguments, env=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(*arguments, env=None):
    outcome = glad(*arguments, "--json", env=env)
    assert outcome.exit_code == 0, outcome.output
    return {row["setting"]: (row["value"], row["from"]) for row in json.loads(outcome.stdout)["settings"]}


def test_flags_win_over_the_environment_that_over_the_file_that_over_defaults(here):
    text = "score:\n  batch-size: 16\n  actors: 3\n  num_cpus: 0.5\n  seed: 7\n  overwrite: true\n  maps: full\n"
    (here / "glad.yaml").write_text(text)
    values = settings("config", "show", "score", "photos", "--seed", 9, env={"GLAD_SCORE_ACTORS": "4"})
    assert values["seed"] == (9, "flag")
    assert values["source"] == ("photos", "flag")
    assert values["actors"] == (4, "environment")
    assert values["batch-size"] == (16, "file")
    assert values["num-cpus"] == (0.5, "file")
    assert values["overwrite"] == (True, "file")
    assert values["maps"] == ("full", "file")
    assert values["precision"] == ("off", "default")


def test_a_command_runs_with_the_options_of_the_file(here, tiny_bundle):
    (here / "other.yaml").write_text(f"bundle:\n  inspect:\n    path: {tiny_bundle}\n    json: true\n")
    outcome = glad("--config", "other.yaml", "bundle", "inspect")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["category"] == "widget"
    assert glad("bundle", "inspect").exit_code == 2  # no file, no path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scoer:\n  seed: 1\n", ["section 'scoer'", "did you mean 'score'"]),
        ("bundle:\n  inspct: {}\n", ["section 'bundle.inspct'", "did you mean 'inspect'"]),
        ("score:\n  batchsize: 4\n", ["key 'score.batchsize'", "did you mean 'batch-size'"]),
        ("score:\n  batch-size: many\n", ["score.batch-size", "many"]),
        ("score:\n  batch-size: 0\n", ["score.batch-size", "0"]),
        ("score:\n  seed: true\n", ["score.seed", "True"]),
        ("score:\n  overwrite: 3\n", ["score.overwrite", "true or false"]),
        ("score:\n  maps: huge\n", ["score.maps", "token"]),
        ("score: 4\n", ["'score'", "table"]),
        ("score: [\n", ["not YAML"]),
    ],
)
def test_mistakes_in_the_file_are_one_line_that_names_the_key(here, text, words):
    (here / "glad.yaml").write_text(text)
    outcome = glad("status", "somewhere")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("Error: glad.yaml: ")
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


def test_a_file_that_is_not_there_and_a_command_that_is_not(here):
    assert "none.yaml" in glad("--config", "none.yaml", "status", "x").stderr
    assert "did you mean 'score'" in glad("config", "show", "scor").stderr
    assert "retrain" in glad("config", "show").stdout


def test_options_given_to_config_show_are_checked(here):
    assert "did you mean '--batch-size'" in glad("config", "show", "score", "--batchsize", 3).stderr
    assert "'batch-size' does not fit" in glad("config", "show", "score", "--batch-size", "many").stderr
    assert "'actors' does not fit" in glad("config", "show", "score", env={"GLAD_SCORE_ACTORS": "x"}).stderr
