import errno
import os
from pathlib import Path

import numpy as np
import pytest
from drawn_datasets import MARKED, draw_image, draw_mask, draw_mvtec, draw_visa
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.archive.layouts import read_dataset
from pipelines.cli.main import app
from pipelines.evaluate.datasets import published_name, read_mask, resize_mask

STORAGE = Storage()


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    return draw_mvtec(tmp_path / "mvtec")


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    return draw_visa(tmp_path / "visa")


def test_categories_identify_a_published_dataset() -> None:
    assert published_name({"bottle", "screw"}) == "MVTec-AD"
    assert published_name({"candle"}) == "VisA"
    assert published_name({"pcb6", "pcb1"}) == "PCB-Bank"
    assert published_name({"circuit_board"}) is None


def test_every_value_but_0_of_a_mask_is_anomalous(mvtec: Path, visa: Path) -> None:
    for root in (mvtec, visa):
        examples = read_dataset(str(root), STORAGE)
        masks = [read_mask(example, STORAGE, examples) for example in examples if example.mask]
        assert [(mask.shape, mask.sum()) for mask in masks] == [((10, 12), MARKED)] * 2


def test_a_resized_mask_keeps_its_corner() -> None:
    whole = np.zeros((10, 20), bool)
    whole[:5, 10:] = True
    small = resize_mask(whole, 4)
    assert small.tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2


def check(path: Path):
    return CliRunner().invoke(app, ["datasets", "check", str(path)])


def test_check_counts_both_layouts(mvtec: Path, visa: Path) -> None:
    for path, name in ((mvtec, "MVTec-AD"), (visa, "VisA")):
        outcome = check(path)
        assert outcome.exit_code == 0, outcome.output
        assert name in outcome.stdout
        assert "6 images, 0 problems" in outcome.stdout


def test_check_names_what_is_wrong(mvtec: Path) -> None:
    draw_image(mvtec / "cable/test/broken/001.png")
    draw_image(mvtec / "cable/test/broken/002.png")
    draw_mask(mvtec / "cable/ground_truth/broken/002_mask.png", size=(7, 7))
    draw_image(mvtec / "cable/test/broken/003.png")
    draw_mask(mvtec / "cable/ground_truth/broken/003_mask.png", value=0)
    (mvtec / "bottle/test/good/001.png").write_bytes(b"torn")
    outcome = check(mvtec)
    assert outcome.exit_code == 1
    for words in (
        "cable/test/broken/001.png: anomalous, but without a mask",
        "002_mask.png: 7 x 7 pixels, its image has 12 x 10",
        "003_mask.png: nothing is marked in it",
        "bottle/test/good/001.png: not PNG",
        "4 problems",
    ):
        assert words in outcome.stdout


def test_a_disk_that_fails_is_no_problem_of_the_dataset(mvtec: Path, monkeypatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    names = [example.uri for example in read_dataset(str(mvtec), STORAGE)]
    broken: list[str] = []

    def fails(path: str, flags: int) -> int:
        if path in broken:
            raise OSError(errno.EIO, "Input/output error", path)
        return os.open(path, flags)

    monkeypatch.setattr("cluster.local._at_once", fails)
    broken.append(names[0])
    outcome = CliRunner().invoke(app, ["datasets", "check", str(mvtec)])
    assert outcome.exit_code == 1
    assert f"{names[0]}: {names[0]}: [Errno 5]" in outcome.stdout
    broken += names
    outcome = CliRunner().invoke(app, ["datasets", "check", str(mvtec)])
    assert outcome.exit_code == 2
    assert "Input/output error; give the same command again when" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
