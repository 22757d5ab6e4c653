"""What may import what: packages, the folders of `pipelines`, and no circle anywhere.

Imports inside functions and under TYPE_CHECKING count as well: a reader has to follow them all the same.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("glad_core", "cluster", "pipelines")
OURS = {*PACKAGES, "tests", "benchmarks"}
FORBIDDEN = {
    "glad_core": (OURS - {"glad_core"}) | {"ray", "pyarrow", "fsspec", "s3fs"},
    "cluster": OURS - {"cluster"},
    "pipelines": OURS - {"pipelines", "glad_core", "cluster"},
}
# From the bottom up: a folder of `pipelines` imports itself and the folders named here.
MAY_IMPORT = {
    "archive": set(),
    "runs": set(),
    "models": set(),
    "score": {"archive", "runs", "models"},
    "train": {"archive", "runs", "models", "score"},
    "evaluate": {"archive", "runs", "models", "score"},
    "export": {"archive", "runs"},
    "report": {"archive", "runs", "evaluate", "export"},
    "demo": {"score", "evaluate", "report"},
    "small_model": {"demo"},
    "cli": {"archive", "runs", "models", "score", "train", "evaluate", "export", "report", "demo"},
}
CORE_MAY_IMPORT = {  # folders of `glad_core`; "" are the files beside them
    "bundle": {""},
    "decoding": {""},
    "engine": {"", "bundle"},
    "training": {"", "bundle"},
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(source: str, known: set[str]) -> set[str]:
    """Dotted names that a module imports anywhere; names of ``known`` modules in full, others as they are written."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module comes from"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else str(node.module) for name in whole}
    return names


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """What each module of ours imports."""
    files = modules()
    return {name: imports(file.read_text(), set(files)) for name, file in files.items()}


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_package_imports_only_what_it_may(package: str, graph: dict[str, set[str]]) -> None:
    mine = {name: found for name, found in graph.items() if name.split(".")[0] == package}
    assert mine
    broken = {
        name: {other for other in found if other.split(".")[0] in FORBIDDEN[package]} for name, found in mine.items()
    }
    assert {name: bad for name, bad in broken.items() if bad} == {}


def test_folders_of_pipelines_import_only_downwards(graph: dict[str, set[str]]) -> None:
    assert set(MAY_IMPORT) == {name.split(".")[1] for name in graph if name.startswith("pipelines.")}
    assert not circles(MAY_IMPORT), "the rule itself is a circle"
    assert upward(graph, "pipelines", MAY_IMPORT) == []


def test_folders_of_glad_core_import_only_what_they_may(graph: dict[str, set[str]]) -> None:
    assert upward(graph, "glad_core", CORE_MAY_IMPORT) == []


def upward(graph: dict[str, set[str]], package: str, may_import: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports between the folders of a package that its rule does not allow."""
    found = []
    for name, imported in graph.items():
        for other in imported:
            if name.startswith(f"{package}.") and other.startswith(f"{package}."):
                mine, theirs = (folder_of(module, may_import) for module in (name, other))
                if mine in may_import and theirs != mine and theirs not in may_import[mine]:
                    found.append((name, other))
    return found


def folder_of(module: str, folders: dict[str, set[str]]) -> str:
    folder = module.split(".")[1]
    return folder if folder in folders else ""


def test_no_module_imports_itself_by_way_of_others(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == []


def circles(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph, [] if there is none."""
    try:
        TopologicalSorter({name: found & set(graph) for name, found in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_checker_sees_lazy_and_nested_imports_circles_and_upward_imports() -> None:
    source = (
        "if TYPE_CHECKING:\n    from a import b\ndef f():\n    from ray.data import range\n    import pyarrow.fs as x"
    )
    assert imports(source, {"a.b"}) == {"a.b", "ray.data", "pyarrow.fs"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})
    assert upward({"pipelines.runs.x": {"pipelines.cli.y"}}, "pipelines", MAY_IMPORT) == [
        ("pipelines.runs.x", "pipelines.cli.y")
    ]
