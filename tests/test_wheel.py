"""The wheel holds everything the packages need, and works from where it is unpacked."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("glad_core", "pipelines", "cluster")

# What is read from beside the modules: the small bundle (every file verified), both tables, templates, cluster files.
OPENED = """
import sys
from pathlib import Path
import cluster
from glad_core.bundle import presets
from pipelines.report import page
from pipelines.cli.main import app
rooms = [Path(sys.modules[name].__file__).parents[1] for name in ("cluster", "glad_core", "pipelines")]
assert rooms == [Path(sys.argv[1])] * 3, rooms
assert presets.preset("MVTec-AD", "screw")
assert (page.TEMPLATES / "report.html.j2").is_file()
app(["bundle", "inspect", "small"])
"""


def test_a_wheel_holds_every_file_and_runs_without_the_source(tmp_path):
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "home"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    files = [path for room in ROOMS for path in (source / room).rglob("*") if path.is_file()]
    wanted = {path.relative_to(source).as_posix() for path in files}
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*build, "--wheel-dir", wheels, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        held = {name for name in packed.namelist() if ".dist-info/" not in name}
        scripts = next(packed.read(name) for name in packed.namelist() if name.endswith("entry_points.txt"))
        packed.extractall(home)
    assert held == wanted
    assert b"glad = pipelines.cli.main:main" in scripts

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", OPENED, home],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "circuit_board" in ran.stdout
