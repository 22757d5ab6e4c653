import re
import shlex

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


def test_every_command_has_help_and_an_example_that_parses():
    for words, command in commands():
        name = f"glad {' '.join(words)}"
        assert command.help, f"{name} has no docstring"
        example = (command.epilog or "").partition("Example: ")[2]
        assert example.startswith(name), f"{name}: give it an epilog 'Example: {name} ...'"
        command.make_context(name, shlex.split(example)[1 + len(words) :])  # raises if the example does not fit
        shown = glad(*words, "--help")
        assert shown.exit_code == 0
        assert "Example: glad" in shown.stdout, name


def test_every_parameter_has_help_without_symbols_and_acronyms_of_the_paper():
    """A user has not read it: T, δ and the names of its parts mean nothing to them."""
    insider = re.compile(r"δ|\bT\b|min_step|\bA(DS|TP)\b|\bSAFF\b|ᾱ|\bshards?\b")
    for words, command in commands():
        texts = {parameter.name: parameter.help for parameter in command.params if parameter.name != "help"}
        for name, text in {**texts, "the command itself": command.help}.items():
            assert text, f"glad {' '.join(words)}: {name} has no help"
            assert not insider.search(text), f"glad {' '.join(words)}: {name}: {text}"


def test_help_gives_the_exit_codes_and_shells_can_complete():
    shown = " ".join(glad("--help").stdout.split())
    assert "Exit codes: 0" in shown
    assert "--install-completion" in shown
