"""Dataset layouts as scoring, training and evaluation read them: the same categories and images for all of them."""

from pathlib import Path

import pytest
from conftest import make_bucket
from PIL import Image

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive.decode import is_image
from pipelines.archive.layouts import category_folders, choose_category, good_images, read_dataset
from pipelines.archive.listing import Archive, write_manifest
from pipelines.archive.sources import list_source

STORAGE = Storage()


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), "grey").save(path)


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    for category in ("bottle", "cable"):
        for file in (
            "train/good/000.png",
            "test/good/000.PNG",
            "test/broken/000.png",
            "ground_truth/broken/000_mask.png",
        ):
            picture(tmp_path / "mvtec" / category / file)
        (tmp_path / "mvtec" / category / "train/good/Thumbs.db").write_text("no image")
    return tmp_path / "mvtec"


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    root = tmp_path / "visa"
    lines = ["object,split,label,image,mask"]
    for category in ("pcb1", "pcb2"):
        for split, label, name in (("train", "normal", "0"), ("test", "normal", "1"), ("test", "anomaly", "2")):
            image = f"{category}/Data/Images/{'Normal' if label == 'normal' else 'Anomaly'}/{name}.JPG"
            picture(root / image)
            mask = f"{category}/Data/Masks/Anomaly/{name}.png" if label == "anomaly" else ""
            if mask:
                picture(root / mask)
            lines.append(f"{category},{split},{label},{image},{mask}")
    lines.append(lines[2])  # an image that is named twice
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def names(rows, root) -> list[str]:
    return [row["uri"].removeprefix(f"{root}/") for row in rows]


def test_visa_s_test_images_are_scored_and_nothing_else_of_the_folder(visa):
    rows = list(list_source(str(visa), "pcb2", STORAGE))
    assert names(rows, visa) == ["pcb2/Data/Images/Normal/1.JPG", "pcb2/Data/Images/Anomaly/2.JPG"]
    assert {row["category"] for row in rows} == {"pcb2"}
    with pytest.raises(GladError, match=r"holds 2 categories \(pcb1, pcb2\): choose one with --category"):
        list(list_source(str(visa), None, STORAGE))
    with pytest.raises(GladError, match="no category 'pcb3'; did you mean"):
        list(list_source(str(visa), "pcb3", STORAGE))
    both = list(list_source(f"{visa}/", None, STORAGE, several=True))
    assert [row["category"] for row in both] == ["pcb1", "pcb1", "pcb2", "pcb2", "pcb1"]
    paths = {example.path for example in read_dataset(str(visa), STORAGE) if example.split == "test"}
    assert set(names(both, visa)) == paths


def test_a_visa_image_has_the_id_of_a_plain_walk_and_is_listed_once(visa, tmp_path):
    ids = {row["uri"]: row["image_id"] for row in list_source(str(visa), "pcb1", STORAGE)}
    (visa / "split_csv/1cls.csv").rename(visa / "split_csv/other.csv")
    walked = {row["uri"]: row["image_id"] for row in list_source(str(visa), None, STORAGE)}
    assert ids.items() <= walked.items()
    (visa / "split_csv/other.csv").rename(visa / "split_csv/1cls.csv")
    counts = write_manifest(Archive(str(visa), "pcb1", STORAGE, False), None, 0, str(tmp_path / "manifest"))
    assert counts == (2, 1)


def test_good_training_images_of_both_layouts(mvtec, visa):
    found = good_images(str(mvtec), "all", STORAGE)
    assert found == {name: [str(mvtec / name / "train/good/000.png")] for name in ("bottle", "cable")}
    assert good_images(f"{mvtec}/cable/", None, STORAGE) == {"cable": found["cable"]}
    assert list(good_images(str(mvtec), "cable, bottle", STORAGE)) == ["cable", "bottle"]
    assert good_images(str(visa), "pcb2", STORAGE) == {"pcb2": [str(visa / "pcb2/Data/Images/Normal/0.JPG")]}
    with pytest.raises(GladError, match="no category 'pcb'; did you mean 'pcb2'"):
        good_images(str(visa), "pcb", STORAGE)
    with pytest.raises(GladError, match="choose one with --category"):
        good_images(str(mvtec), None, STORAGE)
    with pytest.raises(GladError, match="no category with train/good in it"):
        good_images(str(mvtec / "bottle/test"), None, STORAGE)
    with pytest.raises(GladError, match="no such dataset folder"):
        good_images(str(mvtec / "none"), None, STORAGE)


def test_training_needs_no_test_folder_and_scoring_takes_such_a_folder_as_it_is(tmp_path):
    picture(tmp_path / "widget/train/good/0.png")
    assert list(good_images(str(tmp_path), None, STORAGE)) == ["widget"]
    assert category_folders(str(tmp_path), STORAGE) == {}
    assert names(list_source(str(tmp_path), None, STORAGE), tmp_path) == ["widget/train/good/0.png"]


def test_a_damaged_split_file_is_one_line(visa):
    file = visa / "split_csv/1cls.csv"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GladError, match="not a UTF-8 text file"):
        list(list_source(str(visa), None, STORAGE))
    file.write_text("object,split\n")
    with pytest.raises(GladError, match="lacks the column image, label, mask"):
        read_dataset(str(visa), STORAGE)


def test_one_rule_for_suffixes():
    assert [is_image(path) for path in ("a.PNG", "b/c.tif", "d.jpeg", "e.txt", "png", "f.png.bak")] == [True] * 3 + [
        False
    ] * 3


def test_one_category_is_chosen_without_asking():
    assert choose_category(["bottle"], None, "x") == "bottle"


def test_a_slash_at_the_end_changes_nothing(mvtec, s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    make_bucket(s3_server, "slashes")
    storage = Storage.from_environment()
    for file in ("a/0.png", "a/1.png"):
        storage.write(f"s3://slashes/{file}", b"x")
    rows = list(list_source("s3://slashes/a", None, storage))
    assert len(rows) == 2
    assert list(list_source("s3://slashes/a/", None, storage)) == rows
    assert list(list_source(f"{mvtec}/bottle/", None, STORAGE)) == list(
        list_source(str(mvtec / "bottle"), None, STORAGE)
    )
