"""`glad train` as a user runs it, on a tiny bundle and real files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from glad_core import bundle
from pipelines.cli import app


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    good = root / "part" / "train" / "good"
    good.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(good / f"{number:03}.png")
    return root


def command(dataset: Path, base: Path, out: Path, steps: int) -> list[str]:
    options = ["--base", base, "--out", out, "--steps", steps, "--batch-size", 2, "--learning-rate", 1e-4]
    return ["train", str(dataset), "--category", "part", *map(str, options)]


def weights(folder: Path) -> dict:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bundle(tmp_path, dataset, tiny_bundle):
    steps = 160
    whole = CliRunner().invoke(app, command(dataset, tiny_bundle, tmp_path / "whole", steps))
    assert whole.exit_code == 0, whole.output

    arguments = command(dataset, tiny_bundle, tmp_path / "killed", steps)
    process = subprocess.Popen(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    work = tmp_path / "killed.train"
    while not (work / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()

    resumed = CliRunner().invoke(app, arguments)
    assert resumed.exit_code == 0, resumed.output
    assert "going on from step" in resumed.stdout
    assert not (work / "checkpoint.pt").exists()
    logged = [json.loads(line)["step"] for line in (work / "loss.jsonl").read_text().splitlines()]
    assert logged == list(range(1, steps + 1))

    manifest = bundle.verify(tmp_path / "killed")
    assert manifest.category == "part"
    assert manifest.settings["threshold"] > 0
    assert manifest.settings["delta"] > 0
    assert manifest.provenance["base"] == bundle.read_manifest(tiny_bundle).model_id
    trained, base = weights(tmp_path / "whole"), weights(tiny_bundle)
    assert any((trained[name] != base[name]).any() for name in base)
    for name, weight in weights(tmp_path / "killed").items():
        assert (weight == trained[name]).all(), name


def refused(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


def test_mistakes_are_one_line(tmp_path, dataset, tiny_bundle):
    def train(*arguments):
        return CliRunner().invoke(app, ["train", *map(str, arguments)])

    out = tmp_path / "out"
    rest = ["--base", tiny_bundle, "--out", out]
    refused(train(dataset, "--category", "prat", *rest), "no category 'prat'", "did you mean 'part'")
    refused(train(tmp_path / "nowhere", *rest), "no such dataset folder")
    refused(train(tmp_path, *rest), "no category with train/good")
    refused(train(dataset, "--base", tmp_path, "--out", out), "not a GLAD bundle")
    refused(train(dataset, "--category", "part", "--base", tiny_bundle, "--out", tiny_bundle), "already exists")
    refused(train(dataset, "--category", "part", "--device", "gpu7", *rest), "--device gpu7 cannot be used")
    refused(train(dataset, "--category", "part", "--textures", tmp_path, *rest), "no texture images")

    few = tmp_path / "few" / "train" / "good"
    few.mkdir(parents=True)
    (few / "a.png").write_bytes(b"not an image")
    refused(train(few.parents[1], *rest), "1 images; at least 8")
    for number in range(8):
        (few / f"{number}.png").write_bytes(b"not an image")
    refused(train(few.parents[1], *rest), "0.png", "remove or repair")
    assert not out.exists()


def test_a_checkpoint_of_another_run_is_not_continued(tmp_path, dataset, tiny_bundle):
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *command(dataset, tiny_bundle, out, 100_000)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / "out.train" / "checkpoint.pt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    refused(CliRunner().invoke(app, command(dataset, tiny_bundle, out, 200)), "another run", "recipe")
