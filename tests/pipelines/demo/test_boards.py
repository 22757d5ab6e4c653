"""The demo dataset: its folders, its masks, and that every image depends on its own seed alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glad_core.errors import GladError
from pipelines.demo.boards import DEFECTS, SIZE, board_rng, make_board, make_demo_data


def test_the_folders_are_mvtecs(tmp_path: Path) -> None:
    root = make_demo_data(tmp_path, train_good=2, test_good=1, per_defect=1)
    files = {str(path.relative_to(root)) for path in root.rglob("*.png")}
    expected = {"train/good/000.png", "train/good/001.png", "test/good/000.png"}
    for defect in DEFECTS:
        expected |= {f"test/{defect}/000.png", f"ground_truth/{defect}/000_mask.png"}
    assert files == expected
    mask = np.asarray(Image.open(root / "ground_truth/scratch/000_mask.png"))
    assert mask.shape == (SIZE, SIZE)
    assert mask.any()


def test_an_image_depends_only_on_seed_split_and_index(tmp_path: Path) -> None:
    few = make_demo_data(tmp_path / "few", seed=3, train_good=1, test_good=0, per_defect=1)
    more = make_demo_data(tmp_path / "more", seed=3, train_good=2, test_good=2, per_defect=2)
    for path in few.rglob("*.png"):
        assert path.read_bytes() == (more / path.relative_to(few)).read_bytes()
    other = make_board(board_rng(4, "train", 0))[0]
    assert (other != np.asarray(Image.open(few / "train/good/000.png"))).any()


@pytest.mark.parametrize("defect", DEFECTS)
def test_mask_marks_what_the_defect_changed_and_nothing_else(defect: str) -> None:
    for index in range(3):
        good, empty = make_board(board_rng(0, defect, index))
        image, mask = make_board(board_rng(0, defect, index), defect)
        changed = np.abs(image.astype(int) - good).max(axis=2)
        assert not empty.any()
        assert 60 <= mask.sum() < 0.25 * mask.size
        assert changed[mask].min() >= 5  # the light's gain may lower the threshold of 10 a little
        assert changed[~mask].max() <= 15


def test_a_scratch_is_smaller_than_a_missing_component() -> None:
    scratch, missing = (
        np.mean([make_board(board_rng(1, defect, index), defect)[1].sum() for index in range(6)])
        for defect in ("scratch", "missing_component")
    )
    assert scratch < missing


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GladError, match="choose a folder that can be written"):
        make_demo_data(tmp_path / "file")


def test_unknown_defect_is_named() -> None:
    with pytest.raises(ValueError, match="no defect 'crack'"):
        make_board(np.random.default_rng(0), "crack")
