import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster import session, versions

ROOT = Path(__file__).parents[2]


def test_what_is_installed():
    known = versions.installed()
    assert known["numpy"] == np.__version__
    assert set(versions.COMPARED) <= known.keys()
    assert "pytest" not in known  # of the extras
    assert versions.installed(["glad-that-nobody-has"])["glad-that-nobody-has"] == "none"
    assert not any("+" in version for version in known.values())


def test_differences_are_of_what_results_depend_on():
    ours = {"Python": "3.11.7", "torch": "2.8.0", "typer": "1", "numpy": "2.1"}
    theirs = {"Python": "3.11.9", "torch": "2.8.0", "typer": "2", "numpy": "2.2"}
    assert versions.differences(theirs, ours, "here") == "Python 3.11.9 (here 3.11.7), numpy 2.2 (here 2.1)"
    assert versions.differences(ours, ours, "here") == ""


@pytest.mark.parametrize(
    ("sent", "code", "line"),
    [
        (None, 0, ""),
        ({}, 0, ""),
        ({"torch": "0.4.1", "ray": "9.9"}, 0, f"the cluster has ray {versions.installed()['ray']} (the sender 9.9), "),
        ({"glad-that-nobody-has": "1.0"}, 2, "Error: the cluster has no glad-that-nobody-has ("),
    ],
)
def test_a_submitted_job_says_first_how_its_machine_differs(sent, code, line):
    environment = dict(os.environ)
    if sent is not None:
        environment[versions.SENT_FROM] = json.dumps(versions.installed() | sent)
    command = [sys.executable, "-m", "pipelines.cli", "bundle", "--help"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == bool(line)
    assert done.stderr.startswith(line)


def test_ray_s_paragraph_about_versions_is_one_line():
    paragraph = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12.1\n"
        "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    words = session._other_versions(paragraph)
    assert words.startswith("it has Ray 2.59.0 and Python 3.12.1, this machine Ray 2.60.0 and Python 3.11.7: install")
    assert session._other_versions("nothing of the kind") is None
