from pathlib import Path

import pytest
from drawn_datasets import draw_image, draw_mvtec, draw_visa
from judged_run import make_judged_run

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive.uris import page_id, page_uri
from pipelines.runs import feedback
from pipelines.train.good_images import GoodImage, apply_feedback, good_images

STORAGE = Storage()


@pytest.fixture
def judged(tmp_path: Path, tiny_bundle):
    return make_judged_run(tmp_path / "judged", tiny_bundle)


@pytest.mark.parametrize("layout", ["MVTec-AD", "VisA"])
def test_good_training_images_of_either_layout(tmp_path: Path, layout: str) -> None:
    if layout == "VisA":
        root = draw_visa(tmp_path / "data")
        folder, suffix, names = "Data/Images/Normal", "JPG", ["pcb1", "pcb2"]
        with (root / "split_csv/1cls.csv").open("a") as file:
            file.writelines(f"{name},train,normal,{name}/{folder}/9.JPG,\n" for name in names)
    else:
        root = draw_mvtec(tmp_path / "data")
        folder, suffix, names = "train/good", "png", ["bottle", "cable"]
    for name in names:
        draw_image(root / name / folder / f"9.{suffix}")
    first = {"VisA": "0.JPG", "MVTec-AD": "000.png"}[layout]
    expected = {
        name: [GoodImage(f"{root}/{name}/{folder}/{file}", name) for file in (first, f"9.{suffix}")] for name in names
    }
    assert good_images(str(root), "all", STORAGE) == expected
    assert good_images(str(root), names[1], STORAGE) == {names[1]: expected[names[1]]}
    assert list(good_images(f"{root}/", f"{names[1]}, {names[0]}", STORAGE)) == [names[1], names[0]]
    with pytest.raises(GladError, match="holds 2 categories"):
        good_images(str(root), None, STORAGE)


def test_one_good_image_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(GladError, match="1 good images of 'cable'; at least two"):
        good_images(str(draw_mvtec(tmp_path)), "cable", STORAGE)


def test_marks_choose_training_images(judged) -> None:
    alarms = [row for row in judged.rows if row["is_anomalous"]]
    confirmed = next(row for row in alarms if "/cut/" in row["uri"])
    false_alarm = next(row for row in alarms if "/good/" in row["uri"])
    feedback.mark(judged.run, confirmed, "confirmed")
    feedback.mark(judged.run, false_alarm, "false_alarm")
    images = [GoodImage(uri, "bottle") for uri in ("/a", "/b", confirmed["uri"])]
    location, storage = judged.run.location, judged.run.storage
    kept, change = apply_feedback({"bottle": images}, location, location, storage)
    assert kept == {"bottle": [*images[:2], GoodImage(false_alarm["uri"], "bottle")]}
    assert change == "feedback: 1 good images left out, 1 added"
    with pytest.raises(GladError, match="1 good images left"):
        apply_feedback({"bottle": images[1:]}, location, None, storage)
    assert apply_feedback({"bottle": images}, None, None, storage) == ({"bottle": images}, "")
    storage.delete_folder(judged.run.path("feedback"))
    with pytest.raises(GladError, match="no feedback"):
        apply_feedback({"bottle": images}, location, None, storage)


def test_false_alarms_of_other_categories_or_inside_a_tar_are_not_added(judged) -> None:
    (false_alarm, *_), run = [row for row in judged.rows if row["is_anomalous"] and "/good/" in row["uri"]], judged.run
    feedback.mark(run, false_alarm, "false_alarm")
    feedback.mark(run, false_alarm | {"image_id": "other", "uri": "/x", "category": "cable"}, "false_alarm")
    feedback.mark(run, false_alarm | {"image_id": "tar", "uri": "tar:///s.tar?member=x.png"}, "false_alarm")
    further = {"image_id": page_id("tiff", 2), "uri": page_uri("/bottle/0", 2)}
    feedback.mark(run, false_alarm | further, "false_alarm")
    images = {name: [GoodImage(f"/{name}/{number}", name) for number in range(2)] for name in ("bottle", "nut")}
    kept, change = apply_feedback(images, None, run.location, run.storage)
    assert [image.uri for image in kept["bottle"][2:]] == [false_alarm["uri"]]
    assert kept["nut"] == images["nut"]
    assert change.endswith("1 added, 3 of another category, inside a tar or on a further page not added")
    feedback.mark(run, false_alarm | further, "confirmed")  # training takes the first page, which is another picture
    assert apply_feedback(images, run.location, None, run.storage)[0] == images
