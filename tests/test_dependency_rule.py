"""pipelines -> glad_core, cluster; cluster and glad_core -> nothing of ours; glad_core neither Ray nor storage."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"glad_core", "pipelines", "cluster", "tests", "benchmarks"}
FORBIDDEN = {
    "glad_core": (OURS - {"glad_core"}) | {"ray", "pyarrow", "fsspec", "s3fs"},
    "cluster": OURS - {"cluster"},
    "pipelines": OURS - {"pipelines", "glad_core", "cluster"},
}


def imported_packages(source: str) -> set[str]:
    """Top-level names imported anywhere in a module, lazily or under TYPE_CHECKING included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module comes from"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_package_imports_only_what_it_may(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = {
        str(file.relative_to(ROOT)): sorted(bad)
        for file in files
        if (bad := imported_packages(file.read_text()) & FORBIDDEN[package])
    }
    assert broken == {}


def test_the_checker_sees_lazy_and_nested_imports():
    source = "def f():\n    from ray.data import range\n    import pyarrow.fs as x"
    assert imported_packages(source) == {"ray", "pyarrow"}
