import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from drawn_datasets import MARKED, draw_image, draw_mask, draw_mvtec, draw_visa
from PIL import Image
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.archive.layouts import read_dataset
from pipelines.cli.main import app
from pipelines.evaluate.datasets import published_name
from pipelines.evaluate.masks import read_mask

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
        masks = [read_mask(example, STORAGE, examples) for example in examples if example.masks]
        assert [(mask.marked.shape, mask.marked.sum()) for mask in masks] == [((10, 12), MARKED)] * 2


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
    frames = [Image.new("RGB", (12, 10)) for _ in range(3)]
    frames[0].save(mvtec / "bottle/test/good/002.tif", save_all=True, append_images=frames[1:])
    outcome = check(mvtec)
    assert outcome.exit_code == 1
    for words in (
        "cable/test/broken/001.png: anomalous, but without a mask",
        "002_mask.png: 7 x 7 pixels, its image has 12 x 10",
        "003_mask.png: nothing is marked in it",
        "bottle/test/good/001.png: not PNG",
        "002.tif: 3 pages, of which a dataset takes the first: score it with --pages first",
        "5 problems",
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


MARK = np.zeros((40, 60), bool)
MARK[5:15, 10:20] = True


def drawn(path: Path, values: np.ndarray, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return str(path)


def test_what_is_doubtful_about_a_mask_is_said(tmp_path) -> None:
    root = tmp_path / "set/part"
    turned = Image.Exif()
    turned[0x0112] = 6  # shown as 40 x 60
    picture = np.full((40, 60, 3), 99, np.uint8)
    drawn(root / "train/good/0.png", picture)
    drawn(root / "test/OK/0.png", picture)
    grey = (MARK * 255).astype(np.uint8)
    for name, mask, options in (
        ("inverted", 255 - grey, {}),
        ("empty", grey * 0, {}),
        ("larger", np.kron(grey, np.ones((2, 2), np.uint8)), {}),
        ("turned", grey, {"exif": turned}),
        ("fine", grey, {}),
    ):
        drawn(root / f"test/cut/{name}.jpg", picture, **options)
        drawn(root / f"ground_truth/cut/{name}_mask.png", mask)
        (root / f"ground_truth/cut/{name}.json").write_text("{}")
    out = check(tmp_path / "set")
    text = " ".join(out.stdout.split())
    assert "6 images" not in text
    assert "7 images, 4 problems" in text
    assert "test images taken for good ones: OK; for defects: cut" in text
    assert "is it inverted?" in text
    assert "empty_mask.png: nothing is marked in it" in text
    assert "larger_mask.png: 120 x 80 pixels, its image has 60 x 40" in text
    assert "is the image turned by its EXIF, and the mask not?" in text
    assert "2 sizes, from 60 x 40 to 40 x 60 pixels" in text


def test_a_mask_of_a_turned_picture_is_doubtful_unless_its_shape_tells(tmp_path) -> None:
    root = tmp_path / "set/part"
    grey = (MARK * 255).astype(np.uint8)
    for way in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = way
        drawn(root / f"test/cut/{way}.jpg", np.zeros((40, 60, 3), np.uint8), exif=exif)
        drawn(root / f"ground_truth/cut/{way}.png", grey if way < 5 else grey.T.copy())
        drawn(root / f"test/square/{way}.jpg", np.zeros((40, 40, 3), np.uint8), exif=exif)
        drawn(root / f"ground_truth/square/{way}.png", grey[:, :40].copy())
        drawn(root / f"test/both/{way}.jpg", np.zeros((40, 60, 3), np.uint8), exif=exif)
        drawn(root / f"ground_truth/both/{way}.png", grey, exif=exif)
    assert "10 files, the first " in check(tmp_path / "set").stdout
    outcome = CliRunner().invoke(app, ["datasets", "check", str(tmp_path / "set"), "--json"])
    problems = json.loads(outcome.stdout)["problems"]
    doubtful = [line for line in problems if "drawn on the upright image?" in line]
    names = [line.partition("ground_truth/")[2].partition(".png")[0] for line in doubtful]
    assert names == [f"cut/{way}" for way in (2, 3, 4)] + [f"square/{way}" for way in range(2, 9)]


def test_black_masks_of_good_images_are_no_problem_and_marked_ones_are(mvtec: Path) -> None:
    draw_mask(mvtec / "bottle/ground_truth/good/000_mask.png", value=0)
    assert "6 images, 0 problems" in check(mvtec).stdout
    draw_mask(mvtec / "bottle/ground_truth/good/000_mask.png")
    assert "good/000_mask.png: a mask of no anomalous image" in check(mvtec).stdout


def test_a_split_that_is_not_known_is_named(tmp_path) -> None:
    for name in "ab":
        drawn(tmp_path / f"{name}.png", np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "1cls.csv").write_text("object,split,label,image,mask\nc,Val,ok,a.png,\nc,extra,ok,b.png,\n")
    assert [e.split for e in read_dataset(str(tmp_path), STORAGE)] == ["validation", "extra"]
    text = check(tmp_path).stdout
    assert "b.png: of the split 'extra'; only train, test and validation count" in text
    assert "2 images, 1 problems" in text


def test_check_counts_pictures_that_a_square_would_squeeze(tmp_path) -> None:
    for number, size in enumerate([(20, 100), (90, 40), (40, 40)]):
        drawn(tmp_path / f"part/train/good/{number}.png", np.zeros((*size, 3), np.uint8))
    drawn(tmp_path / "part/test/good/0.png", np.zeros((40, 40, 3), np.uint8))
    text = " ".join(check(tmp_path).stdout.split())
    assert "2 of 4 pictures are more than 1.5 times longer than wide" in text


def test_masks_of_mvtec_loco_and_of_several_files_are_merged(tmp_path) -> None:
    root = tmp_path / "set/part"
    drawn(root / "validation/good/000.png", np.zeros((40, 60, 3), np.uint8))
    drawn(root / "train/good/000.png", np.zeros((40, 60, 3), np.uint8))
    other = np.zeros((40, 60), np.uint8)
    other[30:35, 50:55] = 3
    grey = (MARK * 255).astype(np.uint8)
    drawn(root / "test/logical_anomalies/000.png", np.zeros((40, 60, 3), np.uint8))
    drawn(root / "ground_truth/logical_anomalies/000/000.png", grey)
    drawn(root / "ground_truth/logical_anomalies/000/001.png", other)
    drawn(root / "test/scratch/a_1.png", np.zeros((40, 60, 3), np.uint8))
    drawn(root / "ground_truth/scratch/a_1_mask_0.png", grey)
    drawn(root / "ground_truth/scratch/a_1_mask_1.bmp", other)
    examples = read_dataset(str(tmp_path / "set"), STORAGE)
    assert [e.split for e in examples].count("validation") == 1
    anomalous = [example for example in examples if example.anomalous]
    assert len(anomalous) == 2
    for example in anomalous:
        assert (read_mask(example, STORAGE, examples).marked == (MARK | (other > 0))).all()


def test_masks_find_their_pictures_and_the_others_are_named(tmp_path) -> None:
    grey = (MARK * 255).astype(np.uint8)
    blank = np.zeros((40, 60, 3), np.uint8)
    drawn(tmp_path / "whole/train/good/0.png", blank)
    drawn(tmp_path / "whole/val/good/0.png", blank)
    for name in ("a", "a_label", "1", "2"):
        drawn(tmp_path / f"whole/test/Cut/{name}.png", blank)
    for name in ("a_label_mask", "1_mask", "1/other_mask", "77_mask"):
        drawn(tmp_path / f"whole/ground_truth/cut/{name}.png", grey)
    drawn(tmp_path / "alone/test/good/0.png", blank)  # beside a category with train/: no less a category
    examples = {example.path: example for example in read_dataset(str(tmp_path), STORAGE)}
    assert examples["whole/val/good/0.png"].split == "validation"
    assert "alone/test/good/0.png" in examples
    masks = {path: [m.rpartition("ground_truth/")[2] for m in e.masks] for path, e in examples.items() if e.anomalous}
    assert masks == {
        "whole/test/Cut/a.png": [],
        "whole/test/Cut/a_label.png": ["cut/a_label_mask.png"],
        "whole/test/Cut/1.png": ["cut/1/other_mask.png", "cut/1_mask.png"],
        "whole/test/Cut/2.png": [],
    }
    assert "cut/77_mask.png: a mask of no anomalous image" in " ".join(check(tmp_path).stdout.split())
