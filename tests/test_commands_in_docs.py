"""What README.md and docs/ tell people to type is what the programs take.

Every `glad` line is parsed by the command itself; every other program's file, target and options have to be there. The
blocks marked `sh` in the README are run as they stand, in `tests/integration/test_readme.py`.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from pipelines.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?((?:glad|make|python|python3|pip|ray|kubectl|git) .*)$")


def commands(page: Path) -> list[tuple[str, bool]]:
    """Lines of the page's code blocks that start a program, and (False) what the text says of `glad ...`, in part."""
    found, fenced = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            match = PROGRAM.match(line.strip())
            if match:
                found.append((match[1].split("  #")[0].split(" # ")[0].strip(), True))
        else:
            found += [(words, False) for words in re.findall(r"`((?:glad|make) [a-z][^`]*)`", line)]
    return found


def parse(words: list[str], whole: bool) -> None:
    """Let click parse the words as it would before running them."""
    command, rest = typer.main.get_command(app), words[1:]
    while isinstance(command, TyperGroup) and rest:
        assert rest[0] in command.commands, f"no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    if whole and "--help" not in rest:
        command.make_context(words[1], list(rest))
    if command.context_settings.get("ignore_unknown_options"):  # takes those of another command
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    own = rest[: rest.index("--")] if "--" in rest else rest
    unknown = [word for word in own if word.startswith("-") and word.split("=")[0] not in known | {"--help"}]
    assert not unknown, f"no option {unknown}"


ALL = [(page.name, *found) for page in PAGES for found in commands(page)]


@pytest.mark.parametrize(("page", "command", "whole"), ALL)
def test_a_command_in_the_documents_is_one(page: str, command: str, whole: bool) -> None:
    words = shlex.split(re.sub(r"[\[\]]", " ", command))
    if words[0] == "glad":
        parse(words, whole)
    elif words[0] == "make":
        assert words[1] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0].startswith("python") and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        for option in (word for word in words if word.startswith("--")):
            assert option in source or option[2:].replace("-", "_") + ":" in source, f"no option {option}"


def test_the_documents_have_commands_and_no_dead_links() -> None:
    assert len(ALL) > 20
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
