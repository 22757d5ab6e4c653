import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app

HEAVY = {"torch", "ray", "pyarrow", "numpy", "matplotlib", "diffusers"}


@pytest.mark.parametrize("words", [["--help"], ["score", "--help"]])
def test_help_is_quick_and_loads_nothing_heavy(words):
    code = f"""
import sys
from pipelines.cli.main import app
app({words}, standalone_mode=False)
print("loaded", {HEAVY} & set(sys.modules))
"""
    started = time.monotonic()
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.stdout.endswith("loaded set()\n"), outcome.stderr
    assert time.monotonic() - started < 20


def test_the_callback_reads_the_configuration_file(tmp_path, monkeypatch):
    """./glad.yaml if it exists, unless --config names another file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glad.yaml").write_text("score:\n  batch-size: many\n")
    (tmp_path / "other.yaml").write_text("score:\n  seed: many\n")
    assert "glad.yaml: score.batch-size" in CliRunner().invoke(app, ["status", "x"]).stderr
    assert "other.yaml: score.seed" in CliRunner().invoke(app, ["--config", "other.yaml", "status", "x"]).stderr


def test_the_version_is_that_of_the_package():
    outcome = CliRunner().invoke(app, ["--version"])
    assert (outcome.exit_code, outcome.stdout) == (0, f"glad {version('glad-ray')}\n")
