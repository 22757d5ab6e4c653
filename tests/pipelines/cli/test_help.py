import json
import shlex
import shutil

import typer.main
from typer.testing import CliRunner

from pipelines.cli.main import app


def commands(group=None, words=()):
    """Every command of `glad` with the words that call it."""
    for name, command in sorted((group or typer.main.get_command(app)).commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def glad(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_command_says_what_it_does_with_an_example_that_parses():
    for words, command in commands():
        called = f"glad {' '.join(words)}"
        assert command.help, f"{called} has no docstring"
        example = (command.epilog or "").partition("Example: ")[2]
        assert example.startswith(called), f"{called}: give it an epilog 'Example: {called} ...'"
        command.make_context(called, shlex.split(example)[1 + len(words) :])  # as typed: raises if it does not fit
        shown = glad(*words, "--help")
        assert shown.exit_code == 0
        assert "Example: glad" in shown.stdout, called


def test_help_gives_the_exit_codes_and_shells_can_complete():
    shown = " ".join(glad("--help").stdout.split())
    assert "Exit codes: 0" in shown
    assert "--install-completion" in shown


def test_json_of_a_bundle_and_of_a_dataset(tiny_bundle, tmp_path):
    outcome = glad("bundle", "inspect", tiny_bundle, "--json")
    assert json.loads(outcome.stdout) == json.loads((tiny_bundle / "glad.json").read_text())
    broken = tmp_path / "data/nut/train/good/0.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no picture")
    (tmp_path / "data/nut/test/good").mkdir(parents=True)
    outcome = glad("datasets", "check", tmp_path / "data", "--json")
    assert outcome.exit_code == 1
    found = json.loads(outcome.stdout)
    assert found["categories"]["nut"]["train good"] == 1
    assert "0.png" in found["problems"][0]


def test_json_of_a_registry(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "models/bolt/v1")
    (listed,) = json.loads(glad("registry", "list", tmp_path / "models", "--json").stdout)["categories"]
    assert listed == {"category": "bolt", "current": None, "since": None, "reason": None, "versions": ["v1"]}
    assert glad("registry", "promote", tmp_path / "models", "bolt", "v1").exit_code == 0
    (listed,) = json.loads(glad("registry", "list", tmp_path / "models", "--json").stdout)["categories"]
    assert (listed["current"], listed["reason"]) == ("v1", "by hand")
    (shown,) = json.loads(glad("registry", "show", tmp_path / "models", "bolt", "--json").stdout)["versions"]
    assert (shown["version"], shown["state"], shown["good_images"]) == ("v1", "current", None)
    assert shown["delta"] == json.loads((tiny_bundle / "glad.json").read_text())["settings"]["delta"]
    wrong = glad("registry", "show", tmp_path / "models", "bolts")
    assert wrong.exit_code == 2
    assert "did you mean 'bolt'" in wrong.stderr
