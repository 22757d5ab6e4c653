"""Every command in README.md and docs/ exists, with its options.

Each `glad` line is parsed by the command itself; of other programs the file, the target and the options are looked up.
`tests/integration/test_readme.py` runs the README's blocks marked `sh`.
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
    """Commands of a page: lines of code blocks, which are whole (True), and `glad ...` in the text (False)."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            match = PROGRAM.match(line.strip())
            if match:
                lines.append((match[1].split("  #")[0].split(" # ")[0].strip(), True))
        else:
            lines += [(words, False) for words in re.findall(r"`((?:glad|make) [a-z][^`]*)`", line)]
    return lines


def parse(words: list[str], whole: bool) -> None:
    """Parse the words of a `glad` command without running it; ``whole``: required arguments have to be there, too."""
    command, rest = typer.main.get_command(app), words[1:]
    while isinstance(command, TyperGroup) and rest:
        assert rest[0] in command.commands, f"no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    if whole and "--help" not in rest:
        command.make_context(words[1], list(rest))
    if command.context_settings.get("ignore_unknown_options"):  # `glad config show` has options of other commands
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    own = rest[: rest.index("--")] if "--" in rest else rest
    unknown = [word for word in own if word.startswith("-") and word.split("=")[0] not in known | {"--help"}]
    assert not unknown, f"no option {unknown}"


ALL = [(page.name, *command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command", "whole"), ALL)
def test_a_command_in_the_documents_exists(page: str, command: str, whole: bool) -> None:
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
