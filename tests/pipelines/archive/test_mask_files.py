"""Masks find their pictures as datasets name them; what the names leave open is said."""

from pathlib import Path

import numpy as np
import pytest
from drawn_datasets import draw_image, draw_mask
from PIL import Image
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.archive.layouts import good_images, read_dataset, read_whole
from pipelines.archive.listing import count_outside
from pipelines.archive.pieces import Archive
from pipelines.archive.rows import MASKS, LeftOut
from pipelines.archive.sources import list_source
from pipelines.cli.main import app
from pipelines.evaluate.masks import read_mask

STORAGE = Storage()


def part(root: Path, *masks: str, pictures: tuple[str, ...] = ("test/cut/a.png",)) -> Path:
    """A dataset of one category, with a good training and test image, and these defects and masks."""
    for name in ("train/good/0.png", "test/good/0.png", *pictures):
        draw_image(root / "part" / name)
    for name in masks:
        draw_mask(root / "part" / name)
    return root


def masks_of(root: Path) -> dict[str, list[str]]:
    """Masks of the anomalous images, below the category's folder."""
    return {
        example.path.removeprefix("part/"): [mask.removeprefix(f"{root}/part/") for mask in example.masks]
        for example in read_dataset(str(root), STORAGE)
        if example.anomalous
    }


@pytest.mark.parametrize(
    "mask",
    [
        *("ground_truth/cut/a.png", "ground_truth/cut/a_mask.png", "ground_truth/cut/mask_a.png"),
        *("ground_truth/cut/a-mask.png", "ground_truth/cut/a_gt.tif", "ground_truth/cut/A.mask.PNG"),
        *("ground_truth/cut/a_mask_1.png", "ground_truth/cut/a.png.png", "ground_truth/cut/a.png_mask.png"),
        *("masks/cut/a.png", "Masks/cut/mask-a.bmp", "Ground Truth/cut/a.png", "gt/cut/a_label.png", "mask/cut/a.png"),
        *("masks/a.png", "ground_truth/a_mask.png"),
        *("test/cut/a_mask.png", "test/cut/a-mask.bmp", "test/cut/mask_a.png", "test/cut/a_GT.png"),
        *("test/cut/masks/a.png", "test/masks/cut/a_mask.png", "test/ground_truth/cut/a.png"),
    ],
)
def test_masks_are_found_wherever_and_however_they_are_named(mask: str, tmp_path: Path) -> None:
    root = part(tmp_path, mask)
    assert masks_of(root) == {"test/cut/a.png": [mask]}
    assert read_whole(str(root), STORAGE).orphans == []
    left_out = LeftOut()
    rows = list(list_source(str(root), "part", STORAGE, left_out=left_out))
    assert sorted(row["uri"].removeprefix(f"{root}/part/") for row in rows) == ["test/cut/a.png", "test/good/0.png"]
    outside = count_outside(Archive(str(root), "part", STORAGE, False))
    assert (left_out.others[MASKS], outside) == ((1, 1) if mask.startswith("test") else (0, 2))


@pytest.mark.parametrize(
    ("picture", "mask"),
    [
        ("test/cut/e\u0301.png", "ground_truth/cut/\u00e9_mask.png"),  # macOS takes letters apart
        ("test/cut/images/a.png", "test/cut/masks/a.png"),
        ("test/cut/lot 1/a.png", "ground_truth/cut/a.png"),
        ("test/cut/a.png", "ground_truth/cut/lot 1/a_mask.png"),
        ("test/cut/lot 1/a.png", "ground_truth/cut/lot 1/a.png"),
    ],
)
def test_masks_are_found_in_folders_that_differ_a_little(picture: str, mask: str, tmp_path: Path) -> None:
    assert masks_of(part(tmp_path, mask, pictures=(picture,))) == {picture: [mask]}


def test_names_that_begin_alike_are_not_mixed_up(tmp_path: Path) -> None:
    masks = ("10_mask.png", "1_1_mask.png", "1_mask_1.png")
    pictures = ("test/cut/1.png", "test/cut/10.png", "test/cut/1_1.png", "test/cut/.ipynb_checkpoints/1.png")
    found = masks_of(part(tmp_path, *(f"ground_truth/cut/{mask}" for mask in masks), pictures=pictures))
    assert found == {
        "test/cut/1.png": ["ground_truth/cut/1_mask_1.png"],
        "test/cut/10.png": ["ground_truth/cut/10_mask.png"],
        "test/cut/1_1.png": ["ground_truth/cut/1_1_mask.png"],
    }


def test_pictures_that_are_only_named_like_masks_are_pictures(tmp_path: Path) -> None:
    names = (
        "test/cut/mask_1.png",
        "test/cut/mask_2.png",
        "test/cut/b_gt.png",
        "test/cut/a_label.png",
        "test/mask/a.png",
    )
    root = part(tmp_path, pictures=("test/cut/a.png", *names))
    assert set(masks_of(root)) == {"test/cut/a.png", *names}
    assert len(list(list_source(str(root), "part", STORAGE))) == 7


def test_masks_beside_good_training_images_are_not_trained_on(tmp_path: Path) -> None:
    root = part(tmp_path, "train/good/0_mask.png")
    assert good_images(str(root), None, STORAGE) == {"part": [f"{root}/part/train/good/0.png"]}


def check(root: Path) -> str:
    return " ".join(CliRunner().invoke(app, ["datasets", "check", str(root)]).output.split())


def test_a_mask_that_may_be_of_two_images_is_doubtful_unless_it_names_a_suffix(tmp_path: Path) -> None:
    root = part(tmp_path, "ground_truth/cut/a.png", pictures=("test/cut/a.png", "test/cut/a.jpg"))
    assert masks_of(root) == {f"test/cut/a.{suffix}": ["ground_truth/cut/a.png"] for suffix in ("jpg", "png")}
    examples = [example for example in read_dataset(str(root), STORAGE) if example.anomalous]
    assert all(read_mask(example, STORAGE, examples).doubts == example.doubts != () for example in examples)
    assert "a.png: its mask may be of another image of the same name" in check(root)
    assert "test/cut/a.png: an image beside it has the same name; a mask there would be" in check(root)
    (root / "part/ground_truth/cut/a.png").rename(root / "part/ground_truth/cut/a.jpg_mask.png")
    assert masks_of(root) == {"test/cut/a.jpg": ["ground_truth/cut/a.jpg_mask.png"], "test/cut/a.png": []}


def test_a_mask_in_no_folder_of_a_defect_is_of_no_image_if_two_have_its_name(tmp_path: Path) -> None:
    root = part(tmp_path, "masks/a.png", pictures=("test/cut/a.png", "test/dent/a.png"))
    assert masks_of(root) == {"test/cut/a.png": [], "test/dent/a.png": []}
    assert "masks/a.png: a mask of no anomalous image" in check(root)


def test_mvtec_ad_2_is_read(tmp_path: Path) -> None:
    root = tmp_path / "can"
    for name in ("train/good/0.png", "validation/good/0.png", "test_public/good/1.png", "test_public/bad/1.png"):
        draw_image(root / name)
    draw_mask(root / "test_public/ground_truth/bad/1_mask.png")
    for name in ("test_private/2.png", "test_private_mixed/3.png"):
        draw_image(root / name)
    examples = {example.path: example for example in read_dataset(str(tmp_path), STORAGE)}
    assert {path: (example.split, example.anomalous) for path, example in examples.items()} == {
        "can/train/good/0.png": ("train", False),
        "can/validation/good/0.png": ("validation", False),
        "can/test_public/good/1.png": ("test", False),
        "can/test_public/bad/1.png": ("test", True),
    }
    bad = examples["can/test_public/bad/1.png"]
    assert bad.masks == (f"{root}/test_public/ground_truth/bad/1_mask.png",)
    rows = list(list_source(str(tmp_path), None, STORAGE))
    assert sorted(row["uri"] for row in rows) == [f"{root}/test_public/{kind}/1.png" for kind in ("bad", "good")]
    assert all(row["category"] == "can" for row in rows)
    text = check(tmp_path)
    assert f"left out, since it is no split and holds no masks: {root}/test_private_mixed" in text
    assert "4 images, 0 problems" in text


def test_folders_of_one_split_in_two_spellings_are_both_read(tmp_path: Path) -> None:
    for name in ("train/good/0.png", "Train/good/1.png", "test/good/2.png", "TEST/cut/3.png"):
        draw_image(tmp_path / "set/part" / name)
    root = tmp_path / "set"
    assert sorted(example.path for example in read_dataset(str(root), STORAGE)) == [
        *("part/TEST/cut/3.png", "part/Train/good/1.png", "part/test/good/2.png", "part/train/good/0.png")
    ]
    assert len(good_images(str(root), None, STORAGE)["part"]) == 2
    assert len(list(list_source(str(root), None, STORAGE))) == 2


def test_marked_masks_of_good_images_are_named_and_counted(tmp_path: Path) -> None:
    root = part(tmp_path, "ground_truth/good/0_mask.png", "ground_truth/cut/a_mask.png")
    assert "good/0_mask.png: a mask of no anomalous image" in check(root)
    draw_mask(root / "part/ground_truth/good/0_mask.png", value=0)
    assert "3 images, 0 problems" in check(root)


def test_lossy_masks_are_one_line(tmp_path: Path) -> None:
    root = part(tmp_path, pictures=tuple(f"test/cut/{number}.png" for number in range(12)))
    for number in range(12):
        draw_mask(root / f"part/ground_truth/cut/{number}.png")
        mask = Image.open(root / f"part/ground_truth/cut/{number}.png")
        mask.resize((48, 40)).resize(mask.size, Image.Resampling.BOX).save(root / f"part/ground_truth/cut/{number}.png")
        values = np.asarray(Image.open(root / f"part/ground_truth/cut/{number}.png"))
        assert len(np.unique(values)) > 3
    text = check(root)
    assert f"12 files, the first {root}/part/ground_truth/cut/0.png: lossy: cut at half" in text
    assert text.count("lossy: cut") == 1
    assert "14 images, 12 problems" in text
