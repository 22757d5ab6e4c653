import errno
import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage, StorageError
from glad_core.errors import GladError
from glad_core.threshold import TARGET_FPR, images_needed
from glad_core.views import Framing
from pipelines.train import survey as survey_file
from pipelines.train.good_images import GoodImage
from pipelines.train.survey import HELD_OUT_MAX, NEEDED, held_out_count, survey

STORAGE = Storage()
PEAKS = {"001.png": "3000.0", "002.png": "2000.0"}


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """No image is decoded: its name decides its pixels. Names in the returned set cannot be read."""
    names: set[str] = set()

    def examine(uris, resolution, storage, most_bytes):
        rows = {}
        for uri in uris:
            name = uri.rpartition("/")[2]
            digest = hashlib.sha256(name.encode()).hexdigest()
            rows[uri] = {"digest": digest, "reason": "", "size": "40 x 40", "peak": PEAKS.get(name, "")}
            rows[uri]["pages"] = "3" if name == "003.png" else "1"
            if name in names:
                rows[uri] = {"digest": "", "reason": "damaged", "size": "", "peak": "", "pages": ""}
        return rows, None

    monkeypatch.setattr(survey_file, "_examine", examine)
    return names


def images(count: int, folder: str = "/a", category: str = "nut") -> list[GoodImage]:
    return [GoodImage(f"{folder}/{number:03}.png", category) for number in range(count)]


def names(images: list[GoodImage]) -> set[str]:
    return {image.uri.rpartition("/")[2] for image in images}


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (14, 4), (30, 10), (100, 19), (300, 30), (1000, HELD_OUT_MAX)])
@pytest.mark.usefixtures("unreadable")
def test_a_tenth_is_held_out_and_more_of_few(count: int, held_out: int) -> None:
    surveyed = survey({"nut": images(count)}, 32, STORAGE)
    assert len(surveyed.held_out) == held_out
    assert len(surveyed.fit) == count - held_out
    assert names(surveyed.fit) | names(surveyed.held_out) == names(images(count))
    assert [image.uri for image in surveyed.fit] == sorted(image.uri for image in surveyed.fit)


@pytest.mark.usefixtures("unreadable")
def test_runs_of_consecutive_names_are_held_out() -> None:
    surveyed = survey({"nut": images(400)}, 32, STORAGE)
    numbers = sorted(int(name[:3]) for name in names(surveyed.held_out))
    starts = [number for number in numbers if number - 1 not in numbers]
    assert len(numbers) == 40
    assert len(starts) <= 4  # two of the four runs may touch
    assert all(start % 10 == 0 for start in starts)
    bare = [GoodImage(f"/a/{number}.png", "nut") for number in range(400)]  # 10.png comes after 9.png
    tens = Counter(int(name[:-4]) // 10 for name in names(survey({"nut": bare}, 32, STORAGE).held_out))
    assert set(tens.values()) == {10}
    grown = survey({"nut": images(440)}, 32, STORAGE)
    assert len(names(grown.held_out) & names(surveyed.held_out)) >= 30


@pytest.mark.usefixtures("unreadable")
def test_names_decide_what_is_held_out() -> None:
    few, moved, more = (
        survey({"nut": images(*arguments)}, 32, STORAGE) for arguments in ((30,), (30, "s3://b/c"), (36,))
    )
    assert names(few.held_out) == names(moved.held_out)
    assert len(names(few.held_out) & names(more.held_out)) >= 2  # added images rarely move others
    assert few.fingerprint == moved.fingerprint != more.fingerprint


@pytest.mark.usefixtures("unreadable")
def test_every_category_has_images_held_out() -> None:
    surveyed = survey({"nut": images(30), "bolt": images(5, "/b", "bolt")}, 32, STORAGE)
    assert [image.category for image in surveyed.held_out] == ["nut"] * 10 + ["bolt"]


def test_unreadable_images_are_skipped(unreadable: set[str]) -> None:
    unreadable.add("002.png")
    surveyed = survey({"nut": images(4)}, 32, STORAGE)
    assert surveyed.skipped == [("/a/002.png", "damaged")]
    assert names(surveyed.fit) | names(surveyed.held_out) == {"000.png", "001.png", "003.png"}
    unreadable |= {"000.png", "001.png"}
    with pytest.raises(GladError, match=r"nut: 1 readable good images; at least two are needed; /a/000.png: damaged"):
        survey({"nut": images(4)}, 32, STORAGE)


def test_tasks_start_without_torch() -> None:
    code = "import sys, pipelines.train.job, pipelines.train.survey; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_ray_tasks_examine_the_images(tmp_path: Path, ray_session) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (16, 16 + number, 3), dtype=np.uint8) for number in range(3)]
    for number, array in enumerate(pixels):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("no image")
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())
    surveyed = survey(
        {"nut": [GoodImage(str(tmp_path / f"{number}.png"), "nut") for number in range(5)]}, 16, STORAGE, 10**6
    )
    digests = {image.uri[-5:]: image.digest for image in surveyed.fit + surveyed.held_out}
    assert digests["0.png"] == digests["4.png"] == hashlib.sha256(pixels[0].tobytes()).hexdigest()
    assert len(set(digests.values())) == 3
    assert surveyed.sizes == ["16 x 16", "17 x 16", "18 x 16"]
    ((uri, reason),) = surveyed.skipped
    assert uri.endswith("3.png")
    assert surveyed.kept is not None
    seen = surveyed.kept.frames(str(tmp_path / "0.png"))
    assert seen is not None
    assert np.array_equal(seen.frames[0], pixels[0])
    assert "not PNG" in reason


def test_one_forbidden_image_is_skipped_and_a_disk_that_forbids_all_stops(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    rows = [{"uri": str(tmp_path / f"{number}.png")} for number in range(4)]
    for row in rows:
        Image.new("RGB", (9, 9)).save(row["uri"])
    forbidden = {rows[1]["uri"]}

    def opens(path: str, flags: int) -> int:
        if path in forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os.open(path, flags)

    monkeypatch.setattr("cluster.local._at_once", opens)
    framings = (Framing("squash", 8),)
    examined = [survey_file._examine_one(STORAGE, row, rows, framings)[0] for row in rows]
    assert [bool(row["digest"]) for row in examined] == [True, False, True, True]
    assert "Permission denied" in examined[1]["reason"]
    forbidden |= {row["uri"] for row in rows}
    with pytest.raises(StorageError, match="permission denied"):
        survey_file._examine_one(STORAGE, rows[1], rows, framings)


@pytest.mark.usefixtures("unreadable")
def test_files_with_further_pages_are_known(tmp_path) -> None:
    assert survey({"nut": images(30)}, 32, STORAGE).paged == ["/a/003.png"]
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    for number, rest in enumerate(([], frames[1:])):
        frames[0].save(tmp_path / f"{number}.tif", save_all=True, append_images=rest)
        row = {"uri": str(tmp_path / f"{number}.tif")}
        assert survey_file._examine_one(STORAGE, row, [row], (Framing("squash", 8),))[0]["pages"] == str(number + 1)


@pytest.mark.usefixtures("unreadable")
def test_the_levels_of_deep_pictures() -> None:
    surveyed = survey({"nut": images(30)}, 32, STORAGE)
    assert sorted(surveyed.peaks) == [2000.0, 3000.0]
    assert (surveyed.white_level, surveyed.dark_level) == (4095.0, 1000.0)
    assert replace(surveyed, peaks=[]).white_level is None
    assert replace(surveyed, peaks=[0.8]).white_level == 1.0
    assert replace(surveyed, peaks=[65535.0]).white_level == 65535.0
    assert replace(surveyed, peaks=[100.0]).white_level == 255.0


@pytest.mark.parametrize(
    ("images", "held_out"), [(1, 1), (2, 1), (5, 1), (24, 8), (57, 19), (90, 19), (200, 20), (400, 40), (5300, 40)]
)
def test_as_many_are_held_out_as_a_threshold_needs_but_most_are_left(images: int, held_out: int) -> None:
    assert held_out_count(images) == held_out
    assert images_needed(TARGET_FPR) == NEEDED
