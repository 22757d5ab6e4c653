"""Rules of CONTRIBUTING.md that ruff has no check for."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 40  # lines of code in a function: signature, docstring, comments and blank lines aside
EXCEPTIONS = {"glad_core/adaptive.py: reconstruct"}  # Sec. 3.3 and 3.4 of the paper, to be read in one piece


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of code in the body of a function."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    inside = [line.strip() for line in lines[body[0].lineno - 1 : function.end_lineno]]
    return sum(bool(line) and not line.startswith("#") for line in inside)


def long_functions(source: str) -> list[str]:
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [function.name for function in functions if code_lines(function, source.splitlines()) > LONGEST]


def test_functions_are_short_or_say_why_not() -> None:
    files = [file for package in ("glad_core", "pipelines", "cluster") for file in (ROOT / package).rglob("*.py")]
    long = {f"{file.relative_to(ROOT)}: {name}" for file in files for name in long_functions(file.read_text())}
    assert long == EXCEPTIONS


def test_a_long_function_is_found() -> None:
    body = "\n".join(f"    x = {number}" for number in range(LONGEST))
    assert long_functions(f"def f():\n    '''A docstring.'''\n    # a comment\n\n{body}\n") == []
    assert long_functions(f"def f():\n{body}\n    return x\n") == ["f"]


def test_folders_of_pipelines_and_glad_core_have_empty_init_files() -> None:
    """What they imported would be imported at every start."""
    files = [*(ROOT / "pipelines").glob("*/__init__.py"), *(ROOT / "glad_core").glob("*/__init__.py")]
    assert len(files) >= 13
    assert [file for file in files if file.read_text()] == []
