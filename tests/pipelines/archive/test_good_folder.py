from pathlib import Path

import pytest
from drawn_datasets import draw_image

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive.layouts import good_images

STORAGE = Storage()


def draw(folder: Path, *names: str) -> str:
    for name in names:
        draw_image(folder / name)
    return str(folder)


@pytest.mark.parametrize(
    ("folder", "category", "expected"),
    [
        ("screws", None, "screws"),
        ("screws", "all", "screws"),
        ("screws", "bolt", "bolt"),
        ("good", None, "board"),
        ("Defect-Free", None, "board"),
        ("screws/train/OK", None, "board"),
        ("screws/test/good", None, "board"),
        ("train", None, "board"),
    ],
)
def test_a_folder_of_good_pictures_is_one_category(tmp_path: Path, folder: str, category, expected: str) -> None:
    lines: list[str] = []
    root = draw(tmp_path / folder, "b.png", "a.PNG", ".hidden.png", ".thumbnails/a.png")
    Path(root, "notes.txt").write_text("no picture")
    Path(root, "empty").mkdir()
    found = good_images(f"{root}/", category, STORAGE, "board", lines.append)
    assert found == {expected: [f"{root}/a.PNG", f"{root}/b.png"]}
    assert lines == [f"2 pictures in {root}, all taken for good ones of '{expected}'; 1 other files left out"]


@pytest.mark.parametrize(
    ("folder", "files", "words"),
    [
        ("p", ["1.png", "2.png", "bad/3.png"], r"the pictures in its folders bad may not all be good; give a folder"),
        ("p", ["1.png", "2.png", "test/x/3.png"], "in its folders test may not"),
        ("p", ["good/1.png", "scratch/3.png"], r"folders good, scratch may not all be good; .* such as \S+/p/good, or"),
        ("p", ["train/1.png", "train/2.png"], "in its folders train may not"),
        ("p", ["monday/1.png", "tuesday/1.png"], r"CATEGORY/train/good/NAME.png \(MVTec-AD's layout\), or split_csv"),
        ("p", ["1.png", "1_mask.png", "2.png"], "1_mask.png: masks mark defects"),
        ("bad", ["1.png", "2.png"], "by its name, not all of its pictures are good"),
        ("Not OK", ["1.png", "2.png"], "by its name, not all of its pictures are good"),
        ("screws/test/scratch", ["1.png", "2.png"], "by its name, not all of its pictures are good"),
        ("test", ["1.png", "2.png"], "by its name, not all of its pictures are good"),
        ("ground_truth", ["1.png", "2.png"], "by its name, not all of its pictures are good"),
        ("p", [], r"no pictures directly in it, and no dataset; expected are good pictures, or CATEGORY/train/good/"),
        ("a,b", ["1.png", "2.png"], "cannot be called 'a,b': --category"),
    ],
)
def test_what_may_not_be_good_is_no_training_picture(tmp_path: Path, folder: str, files: list[str], words: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(GladError, match=words):
        good_images(draw(tmp_path / folder, *files), None, STORAGE, "board")


@pytest.mark.parametrize("category", ["a,b", "../x", ".x", "", "a/b"])
def test_the_name_of_a_category_is_one_word_of_a_path(tmp_path: Path, category: str) -> None:
    with pytest.raises(GladError, match="of one category, which cannot be called"):
        good_images(draw(tmp_path, "1.png", "2.png"), category, STORAGE)


def test_a_dataset_with_a_picture_beside_its_categories_stays_a_dataset(tmp_path: Path) -> None:
    root = draw(tmp_path, "preview.png", "other.png", "nut/train/good/0.png")
    assert good_images(root, None, STORAGE) == {"nut": [f"{root}/nut/train/good/0.png"]}
