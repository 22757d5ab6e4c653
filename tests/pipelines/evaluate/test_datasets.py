from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive.layouts import read_dataset
from pipelines.cli.main import app
from pipelines.evaluate.datasets import published_name, read_mask, resize_mask

STORAGE = Storage()


def picture(path: Path, size: tuple[int, int] = (12, 10), value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


def mask(path: Path, size: tuple[int, int] = (12, 10), value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[2:4, 3:6] = value
    Image.fromarray(pixels).save(path)


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    for category in ("bottle", "cable"):
        root = tmp_path / "mvtec" / category
        picture(root / "train/good/000.png")
        picture(root / "test/good/000.png")
        picture(root / "test/broken/000.png")
        mask(root / "ground_truth/broken/000_mask.png")
    return tmp_path / "mvtec"


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    root = tmp_path / "visa"
    lines = ["object,split,label,image,mask"]
    for category in ("pcb1", "pcb2"):
        for split, label, name in (("train", "normal", "0"), ("test", "normal", "1"), ("test", "anomaly", "2")):
            image = f"{category}/Data/Images/{'Normal' if label == 'normal' else 'Anomaly'}/{name}.JPG"
            picture(root / image)
            place = f"{category}/Data/Masks/Anomaly/{name}.png" if label == "anomaly" else ""
            if place:
                mask(root / place, value=1)  # VisA's masks hold class numbers
            lines.append(f"{category},{split},{label},{image},{place}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_mvtec_layout_as_a_tree_and_as_one_category(mvtec: Path) -> None:
    examples = read_dataset(str(mvtec), STORAGE)
    assert len(examples) == 6
    broken = {example.path: example for example in examples}["cable/test/broken/000.png"]
    assert (broken.category, broken.split, broken.anomalous) == ("cable", "test", True)
    assert broken.mask == f"{mvtec}/cable/ground_truth/broken/000_mask.png"
    assert {example.mask for example in examples if not example.anomalous} == {None}
    alone = read_dataset(str(mvtec / "cable"), STORAGE)
    assert {example.path for example in alone} == {e.path for e in examples if e.category == "cable"}


def test_visa_s_own_layout_by_its_split_file(visa: Path) -> None:
    examples = read_dataset(str(visa), STORAGE)
    assert len(examples) == 6
    anomalous = [example for example in examples if example.anomalous]
    assert [example.path for example in anomalous] == [f"pcb{n}/Data/Images/Anomaly/2.JPG" for n in (1, 2)]
    assert read_mask(anomalous[0], STORAGE).sum() == 6
    assert [example.split for example in examples if example.category == "pcb1"] == ["train", "test", "test"]
    (visa / "split_csv/1cls.csv").rename(visa / "1cls.csv")  # PCB-Bank's place for it
    assert read_dataset(str(visa), STORAGE) == examples


def test_the_paper_s_datasets_are_known_by_their_categories() -> None:
    assert published_name({"bottle", "screw"}) == "MVTec-AD"
    assert published_name({"candle"}) == "VisA"
    assert published_name({"pcb6", "pcb1"}) == "PCB-Bank"
    assert published_name({"circuit_board"}) is None


def test_masks_keep_their_place_when_resized() -> None:
    whole = np.zeros((10, 20), bool)
    whole[:5, 10:] = True
    small = resize_mask(whole, 4)
    assert small.tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2


def check(path: Path):
    return CliRunner().invoke(app, ["datasets", "check", str(path)])


def test_check_says_what_is_there(mvtec: Path, visa: Path) -> None:
    for path, name in ((mvtec, "MVTec-AD"), (visa, "VisA")):
        outcome = check(path)
        assert outcome.exit_code == 0, outcome.output
        assert name in outcome.stdout
        assert "6 images, 0 problems" in outcome.stdout


def test_check_names_what_is_wrong(mvtec: Path) -> None:
    picture(mvtec / "cable/test/broken/001.png")
    picture(mvtec / "cable/test/broken/002.png")
    mask(mvtec / "cable/ground_truth/broken/002_mask.png", size=(7, 7))
    picture(mvtec / "cable/test/broken/003.png")
    mask(mvtec / "cable/ground_truth/broken/003_mask.png", value=0)
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


def test_mistakes_are_one_line(tmp_path: Path, visa: Path) -> None:
    with pytest.raises(GladError, match="no such dataset"):
        read_dataset(str(tmp_path / "nowhere"), STORAGE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GladError, match="no dataset there"):
        read_dataset(str(tmp_path / "empty"), STORAGE)
    (visa / "split_csv/1cls.csv").write_text("object,split\nx,y\n")
    with pytest.raises(GladError, match="lacks the column image, label, mask"):
        read_dataset(str(visa), STORAGE)
