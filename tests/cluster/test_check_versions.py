from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster.check_versions import check_lock, is_pinned, open_commands, open_image, open_versions

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789" * 4


def find(path):
    return ROOT / "requirements.lock" if path.endswith(".lock") else None


@pytest.mark.parametrize(
    "command",
    [
        "pip install ray",
        "pip install ray<3",
        "pip install 'ray[default]>=2' -U",
        "python -m pip install ray==2.*",
        "pip3.11 install ray~=2.60",
        "uv pip install --python ~/env ray",
        "uv add ray",
        "uv sync",
        "uv run x.py",
        "uv tool install ray",
        "pipx install ray",
        "poetry add ray",
        "conda install -c conda-forge ray",
        "mamba install 'ray>=2'",
        "pip install glad-ray[aws]",
        "pip install --upgrade pip",
        "pip install ray==2.60.0 torch",
        "~/env/bin/pip install --quiet ~/glad",
        "pip install .",
        "pip install -e .",
        "pip install git+https://github.com/x/y@main",
        "pip install 'ray @ git+https://github.com/x/y'",
        "pip install https://s3/ray/latest/ray-3.0.0.dev0-cp311.whl",
        "pip install -r other.txt",
        "pip install -rother.txt",
        "curl -o x https://repo.anaconda.com/Miniconda3-latest-Linux-x86_64.sh",
        "bash -c 'pip install ray'",
        "sudo -H pip install ray && echo x",
        "a; (pip install ray)",
        "X=1 pip install ray",
        "which ray || pip install ray",
        "x=$(pip install ray)",
        "echo `pip install ray`",
        "if ! pip install ray; then true; fi",
        "it's here\npip install ray",
        "pip install \\\n  ray",
    ],
)
def test_commands_that_leave_a_version_open(command):
    assert list(open_commands(command, find))


@pytest.mark.parametrize(
    "command",
    [
        "pip install ray==2.60.0",
        "pip install ray===2.60.0",
        "uv pip install --python ~/env -r ~/glad/requirements.lock",
        "uv pip sync requirements.lock",
        "pip install -c requirements.lock ray",
        "pip install -r requirements.lock ~/glad",
        "pip install --no-deps ~/glad",
        "pip install x-1.0-py3-none-any.whl",
        f"pip install git+https://github.com/x/y@{COMMIT}",
        "conda install -c conda-forge ray=2.60.0",
        "conda create -n env python=3.11 -y",
        "uv sync --locked",
        "curl -LsSf https://astral.sh/uv/0.13.9/install.sh | sh",
        "echo x # pip install ray",
        "sudo apt-get install -y rsync",
        "glad score s3://photos/a --out s3://verdicts/latest",
        "ray start --head",
    ],
)
def test_commands_that_install_the_same_tomorrow(command):
    assert list(open_commands(command, find)) == []


def test_images():
    for image in (
        "ray",
        "rayproject/ray",
        "rayproject/ray:latest",
        "r.io:5000/ray",
        "rayproject/ray:nightly-py311-gpu",
    ):
        assert list(open_image(image)), image
    for image in ("rayproject/ray:2.60.0-py311-gpu", "r.io:5000/glad-ray:0.1.0", f"ray@sha256:{COMMIT}"):
        assert list(open_image(image)) == [], image


def test_every_corner_of_a_file_is_read():
    container = {"image": "x:1", "command": ["sh", "-c", "pip install a"], "args": ["pip", "install", "b"]}
    environment = "pip: [c, d==1]\nconda: {dependencies: [e, f=1, {pip: [g]}]}\n"
    config = {"spec": {"runtimeEnvYAML": environment, "containers": [container]}, "entrypoint": "pip install h; glad"}
    lines = list(open_versions(config))
    assert [line.split(":")[-2].split()[-1] for line in lines] == ["c", "e", "g", "a", "b", "h"]
    assert lines[0].startswith("spec.runtimeEnvYAML: pip: c: ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ray>=2", "leaves the version open"),
        ("ray", "leaves the version open"),
        ("-e /home/me/glad", "folder of one machine"),
        ("glad-ray @ file:///home/me/glad", "folder of one machine"),
        ("torch==2.14.1+cpu", "without a GPU"),
    ],
)
def test_a_lock_file_of_one_machine_is_refused(tmp_path, line, words):
    (tmp_path / "x.lock").write_text(
        f"# a comment\n--index-url https://pypi.org/simple\nnumpy==2.0 \\\n  --hash=sha256:0\n{line}\n"
    )
    (problem,) = check_lock(tmp_path / "x.lock")
    assert words in problem
    assert "make lock" in problem


def test_the_shipped_lock_is_whole():
    """Every dependency is in it in a version that pyproject.toml allows, and nothing in it holds for one machine."""
    import tomllib

    assert list(check_lock(ROOT / "requirements.lock")) == []
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {Requirement(line).name: str(Requirement(line).specifier).removeprefix("==") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["aws"])]
    for package in wanted:
        assert package.specifier.contains(locked[package.name.lower()]), package
    assert {"nvidia-cudnn-cu13", "triton"} <= set(locked)  # of Linux machines with GPUs, whoever made it
    assert all(is_pinned(line) for line in lines)
