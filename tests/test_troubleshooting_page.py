"""docs/troubleshooting.md quotes what the code says, and knows every kind of error an image can end with."""

import ast
import re
from pathlib import Path

from typer.testing import CliRunner

from pipelines.cli.main import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
TREES = [
    ast.parse(path.read_text())
    for room in ("glad_core", "pipelines", "cluster")
    for path in (ROOT / room).rglob("*.py")
]


def said(node):
    """A string as the page quotes it, … for what is put in; None for what is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


STRINGS = {text for tree in TREES for node in ast.walk(tree) if (text := said(node))}


def rows():
    """Cells of every row of a table whose first cell is a quotation."""
    return [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_quoted_message_is_in_the_code():
    table, errors = rows(), []
    quoted = [cells[0].strip("`") for cells in table if "…" in cells[0] or " " in cells[0].strip("`")]
    quoted += [text for cells in table if len(cells) == 4 for text in re.findall(r"`([^`]* [^`]*)`", cells[2])]
    assert len(quoted) > 80
    errors = [text for text in quoted if not any(text in whole for whole in STRINGS)]
    assert errors == [], "the code says it otherwise"


def test_every_kind_of_error_has_its_row():
    kinds = {
        node.args[0].value
        for tree in TREES
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ImageError"
        if len(node.args) == 2 and isinstance(node.args[0], ast.Constant)
    }
    kinds |= {
        value.value
        for tree in TREES
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "error_type" and isinstance(value, ast.Constant)
    }
    assert {"missing", "deadly", "no_model"} <= kinds
    assert kinds == {cells[0].strip("`") for cells in rows() if len(cells) == 4}


def test_what_the_command_line_says_is_quoted_as_it_is():
    section = PAGE.partition("\n## Options\n")[2]
    calls = [["score", "x"], ["score", "x", "--batchsize", "3"], ["score", "x", "--batch-size", "0"], ["scor"]]
    for words in calls:
        outcome = CliRunner().invoke(app, words, env={"TERMINAL_WIDTH": "200"})
        assert outcome.exit_code == 2
        (message,) = re.findall(r"(?:Missing|No such|Invalid)[^│\n]*", outcome.stderr)
        assert any(message.startswith(text) for text in re.findall(r"`([^`]+)`", section)), message
