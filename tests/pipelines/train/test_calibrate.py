import shutil
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from conftest import photo
from judged_run import THRESHOLDS, make_judged_run
from typer.testing import CliRunner

from cluster.storage import Storage, StorageError
from glad_core import calibrated_steps
from glad_core.bundle.glad_json import read_description, verify, write_description
from glad_core.bundle.model import load_bundle
from glad_core.errors import GladError
from glad_core.threshold import conformal_quantile
from pipelines.cli.main import app
from pipelines.train import calibrate, choose_steps, thresholds


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


@pytest.mark.slow
def test_a_bundle_is_calibrated_on_good_images(tmp_path: Path, tiny_bundle, ray_session, monkeypatch) -> None:
    photos = tmp_path / "photos"
    for index in range(5):
        photo(index, photos / f"{index}.png")
    # The steps are chosen on the cluster, where the GPUs are; its processes import the module anew, without this.
    monkeypatch.setattr(choose_steps, "Calibrator", lambda *_, **__: pytest.fail("in the calling process"))
    out = tmp_path / "calibrated"
    outcome = run("calibrate", photos, "--model", tiny_bundle, "--out", out, "--target-fpr", 0.2)
    assert outcome.exit_code == 0, outcome.output
    assert "images on" in outcome.stdout
    assert "from 5 good images" in outcome.stdout
    description, before = verify(out), read_description(tiny_bundle)
    assert description.settings["delta"] != before.settings["delta"]
    assert description.provenance["calibration_images"] == len(description.provenance["good_scores"][""]) == 5
    assert verify(tiny_bundle).model_id == before.model_id  # the base stays as it is

    # The same from a finished run over the same images.
    import pyarrow.parquet as pq

    scored = run("score", photos, "--model", out, "--out", tmp_path / "run", "--actors", 1)
    assert scored.exit_code == 0, scored.output
    scores = pq.read_table(tmp_path / "run/results")["score"].to_pylist()
    assert description.settings["threshold"] == pytest.approx(conformal_quantile(scores, 0.2), abs=1e-4)
    again = tmp_path / "again"
    options = ["--model", out, "--out", again, "--target-fpr", 0.4, "--threshold-only"]
    assert run("calibrate", "--run", tmp_path / "run", *options).exit_code == 0
    assert verify(again).settings["threshold"] == pytest.approx(conformal_quantile(scores, 0.4))
    assert verify(again).provenance["good_scores"] == {"": sorted(scores)}

    refused(run("calibrate", "--run", tmp_path / "run", *options[:3], tmp_path / "x"), "--threshold-only")
    other = ["--model", tiny_bundle, "--out", tmp_path / "x", "--threshold-only"]
    refused(run("calibrate", "--run", tmp_path / "run", *other), "was scored by", description.model_id)
    few = ["--model", out, "--out", tmp_path / "x", "--target-fpr", 0.01, "--threshold-only"]
    refused(run("calibrate", "--run", tmp_path / "run", *few), "5 good images", "at least 99", "0.167")
    refused(run("calibrate", "--run", tmp_path / "run", *few, "--confidence", 0.95), "at least 299", "0.451")
    sure = ["--model", out, "--out", tmp_path / "sure", "--target-fpr", 0.5, "--confidence", 0.95, "--threshold-only"]
    outcome = run("calibrate", "--run", tmp_path / "run", *sure)
    assert "at most 0.5 of new good images exceed it, confidence 0.95" in " ".join(outcome.stdout.split())
    assert verify(tmp_path / "sure").settings["threshold"] == pytest.approx(max(scores))
    assert not (tmp_path / "x").exists()


def test_a_run_full_of_alarms_is_not_one_of_good_images() -> None:
    scores = [0.1] * 19 + [0.4] * 41
    with pytest.raises(GladError, match=r"41 of 60 images exceed the present threshold 0\.306, which allows 1\.0%"):
        thresholds.check_good(scores, 0.306, 0.01)
    thresholds.check_good(scores, None, 0.01)  # nothing to compare with
    thresholds.check_good([0.1] * 58 + [0.4] * 2, 0.306, 0.01)  # two alarms may be chance
    thresholds.check_good([0.1] * 900 + [0.4] * 100, 0.306, 0.05)  # twice as many: other light, not other images


def test_each_of_several_categories_has_a_threshold_and_good_scores_of_its_own(tmp_path, tiny_bundle) -> None:
    base = shutil.copytree(tiny_bundle, tmp_path / "base")
    settings = read_description(base).settings | {"thresholds": {"bottle": 9.0, "cable": 9.0}}
    write_description(base, settings, "bottle,cable", {})
    judged = make_judged_run(tmp_path / "judged", base)
    scores = {name: [np.float32(row["score"]) for row in judged.rows if row["category"] == name] for name in THRESHOLDS}
    words = ["calibrate", "--run", judged.run.location, "--model", base, "--out", tmp_path / "out", "--threshold-only"]
    outcome = run(*words)
    assert outcome.exit_code == 0, outcome.output
    after = verify(tmp_path / "out")
    expected = {name: conformal_quantile(own, 0.05) for name, own in scores.items()}
    assert after.settings["thresholds"] == pytest.approx(expected)
    assert after.provenance["good_scores"] == {name: sorted(map(float, own)) for name, own in scores.items()}
    assert f"thresholds bottle {expected['bottle']:.4g}, cable {expected['cable']:.4g} from 60" in outcome.stdout

    refused(
        run(*words[:-2], tmp_path / "x", words[-1], "--target-fpr", 0.02), "30 good images of 'bottle'", "at least 49"
    )
    write_description(base, settings | {"thresholds": {"bottle": 9.0, "cable": 0.2}}, "bottle,cable", {})
    judged = make_judged_run(tmp_path / "again", base)
    words[2], words[6] = judged.run.location, tmp_path / "x"
    refused(run(*words), "of 30 images of 'cable' exceed the present threshold 0.2")


def test_the_steps_of_several_categories_are_chosen_with_the_prompt_of_each(tmp_path, tiny_bundle, monkeypatch) -> None:
    one = load_bundle(tiny_bundle)
    several = replace(one, prompts=dict.fromkeys(["bottle", "cable"], one.prompt_cond), category="bottle,cable")
    monkeypatch.setattr(choose_steps, "load_bundle", lambda *_, **__: several)
    monkeypatch.setattr(calibrated_steps, "FAST_STEPS", (120,))
    for index, name in enumerate(["bottle", "cable"]):
        photo(index, tmp_path / name / "0.png")
    photo(2, tmp_path / "nut" / "0.png")
    rows = choose_steps.good_images(str(tmp_path), several.category, Storage())
    assert [row["category"] for row in rows] == ["bottle", "cable"]
    with pytest.raises(GladError, match="no image of screw,wood, which the bundle is for"):
        choose_steps.good_images(str(tmp_path), "screw,wood", Storage())
    settings, skipped = choose_steps.steps_from(
        rows, str(tiny_bundle), one.model_id, Storage(), False, "fast", 3, 0, SimpleQueue()
    )
    assert settings.start_step == 120
    assert not skipped


def test_mistakes_are_one_line(tmp_path: Path, tiny_bundle) -> None:
    refused(run("calibrate", "--model", tiny_bundle, "--out", tmp_path / "x"), "good images or --run")
    refused(run("calibrate", tmp_path, "--model", tiny_bundle, "--out", tiny_bundle), "already exists")
    both = ["--threshold-only", "--profile", "fast"]
    refused(run("calibrate", tmp_path, "--model", tiny_bundle, "--out", tmp_path / "x", *both), "leave out --profile")
    (tmp_path / "empty").mkdir()
    refused(run("calibrate", tmp_path / "empty", "--model", tiny_bundle, "--out", tmp_path / "x"), "no images in it")
    options = ["--model", tiny_bundle, "--out", tmp_path / "x", "--threshold-only"]
    refused(run("calibrate", "--run", tmp_path, *options), "no finished run")


def test_the_folder_of_the_meantime(tmp_path: Path) -> None:
    storage, out = Storage(), str(tmp_path / "out")
    work = tmp_path / "out.calibrate"
    with calibrate._workplace(out, storage) as location:
        (work / "run").mkdir()
        (work / "run" / "run.json").write_text("{}")
        assert location == str(work)
    assert not work.exists()

    (work / "bundle").mkdir(parents=True)  # of a killed command
    (work / "bundle" / "glad.json").write_text("{}")
    (work / "claim").write_text("its own")
    with calibrate._workplace(out, storage):
        assert [path.name for path in work.iterdir()] == ["claim"]

    work.mkdir()
    (work / "notes").write_text("of somebody else")
    with pytest.raises(GladError, match="is in the way"), calibrate._workplace(out, storage):
        pytest.fail("used")
    (work / "notes").unlink()

    def two() -> None:
        with calibrate._workplace(out, storage), calibrate._workplace(out, storage):
            pass

    with pytest.raises(GladError, match="another `glad calibrate` writes to"):
        two()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another --out"), calibrate._workplace(f"{tmp_path}/file/x", storage):
        pytest.fail("used")
