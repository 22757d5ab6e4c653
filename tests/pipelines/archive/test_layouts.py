"""Dataset layouts as scoring, training and evaluation read them: the same categories and images for all of them."""

import os
from pathlib import Path

import pytest
from conftest import make_bucket
from drawn_datasets import draw_image, draw_mask, draw_mvtec, draw_visa
from typer.testing import CliRunner

from cluster.storage import Storage
from glad_core.decoding.picture import decode_image, is_image
from glad_core.errors import GladError
from pipelines.archive.fetch import fetch
from pipelines.archive.layouts import category_folders, choose_category, good_images, read_dataset
from pipelines.archive.listing import write_manifest
from pipelines.archive.manifest import read_manifest
from pipelines.archive.pieces import Archive, split
from pipelines.archive.sources import advice_on, list_source
from pipelines.cli.main import app

STORAGE = Storage()


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    root = draw_mvtec(tmp_path / "mvtec")
    (root / "cable/test/good/000.png").rename(root / "cable/test/good/000.PNG")
    for file in ("bottle/train/good/Thumbs.db", "bottle/test/good/notes.txt"):
        (root / file).write_text("no image")
    return root


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    return draw_visa(tmp_path / "visa")


def names(rows, root) -> list[str]:
    return [row["uri"].removeprefix(f"{root}/") for row in rows]


def listed(source, category=None, several=False) -> list[dict]:
    return list(list_source(str(source), category, STORAGE, several))


def test_mvtec_layout_as_a_tree_and_as_one_category(mvtec):
    examples = read_dataset(str(mvtec), STORAGE)
    assert len(examples) == 6
    broken = {example.path: example for example in examples}["cable/test/broken/000.png"]
    assert (broken.category, broken.split, broken.anomalous) == ("cable", "test", True)
    assert broken.masks == (f"{mvtec}/cable/ground_truth/broken/000_mask.png",)
    assert {example.masks for example in examples if not example.anomalous} == {()}
    alone = read_dataset(str(mvtec / "cable"), STORAGE)
    assert alone == [example for example in examples if example.category == "cable"]


def test_visa_layout_by_its_split_file(visa):
    examples = read_dataset(str(visa), STORAGE)
    assert len(examples) == 6
    anomalous = [example for example in examples if example.anomalous]
    assert [example.path for example in anomalous] == [f"pcb{n}/Data/Images/Anomaly/2.JPG" for n in (1, 2)]
    assert anomalous[0].masks == (f"{visa}/pcb1/Data/Masks/Anomaly/2.png",)
    assert [example.split for example in examples if example.category == "pcb1"] == ["train", "test", "test"]
    (visa / "split_csv/1cls.csv").rename(visa / "1cls.csv")  # where PCB-Bank has it
    assert read_dataset(str(visa), STORAGE) == examples


def test_a_folder_that_is_no_dataset_is_one_line(tmp_path):
    with pytest.raises(GladError, match="no such dataset"):
        read_dataset(str(tmp_path / "nowhere"), STORAGE)
    for folder in ("train", "test"):
        (tmp_path / "empty/bottle" / folder).mkdir(parents=True)
    for location in (tmp_path, tmp_path / "empty"):
        with pytest.raises(GladError, match="no dataset there"):
            read_dataset(str(location), STORAGE)


def test_a_damaged_split_file_is_one_line(visa):
    file = visa / "split_csv/1cls.csv"
    whole = file.read_text()
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GladError, match="no text in UTF-8 or UTF-16"):
        listed(visa)
    file.write_text("object,split\n")
    with pytest.raises(GladError, match="lacks the column image, label, mask"):
        read_dataset(str(visa), STORAGE)
    file.write_text(whole[: whole.rindex("anomaly")])
    with pytest.raises(GladError, match="line 7 has too few columns; the file may be cut off"):
        good_images(str(visa), "all", STORAGE)


def test_scoring_visa_lists_test_images_only(visa):
    rows = listed(visa, "pcb2")
    assert names(rows, visa) == ["pcb2/Data/Images/Normal/1.JPG", "pcb2/Data/Images/Anomaly/2.JPG"]
    assert {row["category"] for row in rows} == {"pcb2"}
    with pytest.raises(GladError, match=r"holds 2 categories \(pcb1, pcb2\): choose one with --category"):
        listed(visa)
    with pytest.raises(GladError, match="no category 'pcb3'; did you mean"):
        listed(visa, "pcb3")
    both = listed(f"{visa}/", several=True)
    assert [row["category"] for row in both] == ["pcb1", "pcb1", "pcb2", "pcb2"]
    assert names(both, visa) == [e.path for e in read_dataset(str(visa), STORAGE) if e.split == "test"]
    assert {row["category"] for row in listed(visa, "board", several=True)} == {"board"}  # a name for all of them


def test_a_visa_image_has_the_id_of_a_plain_walk(visa):
    ids = {row["uri"]: row["image_id"] for row in listed(visa, "pcb1")}
    (visa / "split_csv/1cls.csv").rename(visa / "split_csv/other.csv")
    walked = {row["uri"]: row["image_id"] for row in listed(visa)}
    assert ids.items() <= walked.items()
    assert len(walked) == 9  # images, masks and the table


def test_a_visa_manifest_skips_repeated_images_and_leads_to_their_pixels(visa, tmp_path):
    file = visa / "split_csv/1cls.csv"
    file.write_text(file.read_text() + file.read_text().splitlines()[2] + "\n")  # names pcb1's good test image again
    archive = Archive(str(visa), "pcb1", STORAGE, False)
    assert split(archive) == [None]
    counts, _ = write_manifest(archive, None, 0, str(tmp_path / "manifest"))
    assert counts[:3] == (2, 1, 0)
    rows = read_manifest(str(tmp_path / "manifest"), [2], 0, 2, STORAGE).to_pylist()
    assert [decode_image(fetch(STORAGE, row)).shape for row in rows] == [(10, 12, 3)] * 2


def test_good_training_images_of_both_layouts(mvtec, visa):
    images = good_images(str(mvtec), "all", STORAGE)
    assert images == {name: [str(mvtec / name / "train/good/000.png")] for name in ("bottle", "cable")}
    assert good_images(f"{mvtec}/cable/", None, STORAGE) == {"cable": images["cable"]}
    assert list(good_images(str(mvtec), "cable, bottle", STORAGE)) == ["cable", "bottle"]
    assert good_images(str(visa), "pcb2", STORAGE) == {"pcb2": [str(visa / "pcb2/Data/Images/Normal/0.JPG")]}
    assert list(good_images(str(visa), "all", STORAGE)) == ["pcb1", "pcb2"]


def test_a_wrong_choice_of_training_images_is_one_line(mvtec, visa):
    for location, category, message in (
        (visa, "pcb", "no category 'pcb'; did you mean 'pcb2'"),
        (visa, None, "choose one with --category"),
        (mvtec, None, "choose one with --category"),
        (mvtec / "bottle/test", None, r"the pictures in its folders .*good.* may not all be good"),
        (mvtec / "none", None, "no such dataset folder"),
    ):
        with pytest.raises(GladError, match=message):
            good_images(str(location), category, STORAGE)
    file = visa / "split_csv/1cls.csv"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if ",train," not in line))
    with pytest.raises(GladError, match="its split file names no good training image"):
        good_images(str(visa), "pcb1", STORAGE)


def test_training_needs_no_test_folder_and_scoring_walks_a_folder_without_one(tmp_path):
    draw_image(tmp_path / "widget/train/good/0.png")
    assert list(good_images(str(tmp_path), None, STORAGE)) == ["widget"]
    assert category_folders(str(tmp_path), STORAGE) == {}
    assert names(listed(tmp_path), tmp_path) == ["widget/train/good/0.png"]


def test_image_suffixes():
    assert all(map(is_image, ("a.PNG", "b/c.tif", "d.jpeg")))
    assert not any(map(is_image, ("e.txt", "png", "f.png.bak", "g.png/h")))


def test_the_only_category_needs_no_choice():
    assert choose_category(["bottle"], None, "x") == "bottle"


def test_a_slash_at_the_end_changes_nothing(mvtec, s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    make_bucket(s3_server, "slashes")
    storage = Storage.from_environment()
    for file in ("a/0.png", "a/1.png", "b/train/good/0.png", "b/test/good/0.png", "b/test/1.png", "b/test/1_mask.png"):
        storage.write(f"s3://slashes/{file}", b"x")
    for folder, count in (("s3://slashes/a", 2), ("s3://slashes/b", 2)):
        rows = list(list_source(folder, None, storage))
        assert len(rows) == count
        assert list(list_source(f"{folder}/", None, storage)) == rows
    assert good_images("s3://slashes/b/", None, storage) == {"b": ["s3://slashes/b/train/good/0.png"]}
    assert listed(f"{mvtec}/bottle/") == listed(mvtec / "bottle")


@pytest.mark.parametrize("path", ["../other/x.png", "/etc/passwd", "a/../../x.png", "a\0.png"])
@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_split_file_cannot_lead_outside_of_its_folder(tmp_path, path, column):
    row = {"object": "pcb1", "split": "test", "label": "anomaly", "image": "a.png", "mask": "m.png"} | {column: path}
    (tmp_path / "1cls.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    with pytest.raises(GladError, match=r"line 2 leads outside of the dataset's folder"):
        read_dataset(str(tmp_path), STORAGE)


def test_a_folder_that_cannot_be_opened_is_no_category(tmp_path, monkeypatch):
    for name in ("bottle/train", "bottle/test", "closed/train"):
        (tmp_path / name).mkdir(parents=True)
    stat = os.stat

    def refuse(path, *arguments, **options):
        if "closed/" in str(path):
            raise PermissionError(13, "Permission denied")
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert list(category_folders(str(tmp_path), STORAGE)) == ["bottle"]


@pytest.mark.parametrize("word", ["ok", "Good", "NORMAL", "0", "anomaly-free", "Defect Free"])
def test_usual_words_mean_good_in_any_case(word, tmp_path):
    for folder in ("Train", "Test"):
        draw_image(tmp_path / f"set/part/{folder}/{word}/a.png")
    draw_image(tmp_path / "set/part/Test/dent/b.jfif")
    examples = read_dataset(str(tmp_path / "set"), STORAGE)
    assert {e.path: e.anomalous for e in examples} == {
        f"part/Train/{word}/a.png": False,
        f"part/Test/{word}/a.png": False,
        "part/Test/dent/b.jfif": True,
    }
    assert good_images(str(tmp_path / "set"), None, STORAGE) == {"part": [f"{tmp_path}/set/part/Train/{word}/a.png"]}
    listed_names = names(listed(tmp_path / "set"), tmp_path / "set")
    assert sorted(listed_names) == sorted([f"part/Test/{word}/a.png", "part/Test/dent/b.jfif"])


def test_a_test_set_alone_is_a_dataset(tmp_path):
    draw_image(tmp_path / "part/test/good/a.png")
    draw_image(tmp_path / "part/test/cut/b.png")
    assert [e.anomalous for e in read_dataset(str(tmp_path), STORAGE)] == [True, False]


def test_a_split_file_from_excel_is_read(visa):
    file = visa / "split_csv/1cls.csv"
    plain = read_dataset(str(visa), STORAGE)
    text = file.read_text().replace(",", " ; ").replace("/", "\\").replace("normal", "Normal")
    text = "sep=;\n" + text.replace("object", "Object") + ";;;;\n"
    for encoding in ("utf-16", "utf-8-sig"):
        file.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        found = read_dataset(str(visa), STORAGE)
        assert [(e.path, e.uri, e.split, e.anomalous, e.masks) for e in found] == [
            (e.path, e.uri, e.split, e.anomalous, e.masks) for e in plain
        ]


def test_a_row_that_is_there_twice_counts_once_and_one_that_contradicts_is_refused(visa):
    file = visa / "split_csv/1cls.csv"
    plain = read_dataset(str(visa), STORAGE)
    rows = file.read_text().splitlines()
    draw_mask(visa / "pcb2/more.png")
    again = rows[6].replace("Data/Images", "./Data//Images").replace("pcb2/Data/Masks/Anomaly/2.png", "pcb2/more.png")
    file.write_text("\n".join([*rows, again, rows[1]]) + "\n")
    examples = read_dataset(str(visa), STORAGE)
    assert [example.rows for example in examples] == [2, 1, 1, 1, 1, 2]
    assert examples[5].masks == (*plain[5].masks, f"{visa}/pcb2/more.png")  # both count
    assert good_images(str(visa), "pcb1", STORAGE) == {"pcb1": [f"{visa}/pcb1/Data/Images/Normal/0.JPG"]}
    text = CliRunner().invoke(app, ["datasets", "check", str(visa)]).output
    assert "Normal/0.JPG: in 2 rows of the split file; it counts once" in text
    assert "6 images, 2 problems" in text
    for old, new, message in (
        (",train,normal", ",test,normal", "line 8 has the split 'test' for pcb1.*, a line before it 'train'"),
        (",train,normal", ",train,anomaly", "line 8 has the label 'anomaly'"),
        ("pcb1,train", "pcb2,train", "line 8 has the object 'pcb2'"),
    ):
        file.write_text("\n".join([*rows, rows[1].replace(old, new)]) + "\n")
        with pytest.raises(GladError, match=message):
            read_dataset(str(visa), STORAGE)


def test_a_mask_of_a_row_that_is_labelled_good_is_named(visa):
    file = visa / "split_csv/1cls.csv"
    file.write_text(file.read_text().replace("pcb1,test,anomaly", "pcb1,test,normal"))
    text = CliRunner().invoke(app, ["datasets", "check", str(visa)]).output
    assert "pcb1/Data/Masks/Anomaly/2.png: a mask of no anomalous image" in text
    assert "6 images, 1 problems" in text


def test_two_split_files_that_differ_are_refused(visa):
    plain = read_dataset(str(visa), STORAGE)
    text = (visa / "split_csv/1cls.csv").read_text()
    (visa / "1cls.csv").write_text(text)
    assert read_dataset(str(visa), STORAGE) == plain
    (visa / "1cls.csv").write_text(text.replace("train", "test"))
    with pytest.raises(GladError, match="remove one of the two split files"):
        read_dataset(str(visa), STORAGE)


@pytest.mark.parametrize("nothing", ["nan", "None", "NULL"])
def test_a_missing_mask_as_pandas_writes_it_is_none(nothing, visa):
    file = visa / "split_csv/1cls.csv"
    file.write_text(
        "".join(f"{line}{nothing if line.endswith(',') else ''}\n" for line in file.read_text().splitlines())
    )
    assert [len(example.masks) for example in read_dataset(str(visa), STORAGE)] == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("root", ["", "realiad_1024/"])
def test_real_iad_is_named(root, tmp_path):
    for name in ("OK/S0001/a_OK_C1.jpg", "NG/AK/S0002/a_NG_C1.jpg", "NG/AK/S0002/a_NG_C1.png"):
        draw_image(tmp_path / f"{root}audiojack/{name}")
    (tmp_path / "realiad_jsons").mkdir()
    for folder in (tmp_path, tmp_path / f"{root}audiojack"):
        for read in (read_dataset, lambda location, storage: good_images(location, None, storage)):
            with pytest.raises(GladError, match="Real-IAD's layout"):
                read(str(folder), STORAGE)
    assert "its masks too, since Real-IAD's layout is not read" in (advice_on(str(tmp_path), None, STORAGE) or "")
    assert advice_on(str(tmp_path / f"{root}audiojack"), None, STORAGE) is None  # many a factory has OK and NG
