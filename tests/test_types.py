import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_types_are_right() -> None:
    """Here, since mypy keeps one core busy for a minute: other tests run beside it."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
