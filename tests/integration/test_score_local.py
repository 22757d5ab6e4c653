"""The real job on real Ray: the same verdicts whatever the batch size and the number of actors."""

import json
import logging
import os
import re
import shutil
from logging.handlers import BufferingHandler
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import all_cpus_free, photo
from PIL import Image
from typer.testing import CliRunner

from glad_core.errors import GladError
from pipelines.cli.main import app
from pipelines.runs.run import Run
from pipelines.score import job
from pipelines.score.open_run import one_at_a_time

TILES = Path(os.environ.get("GLAD_REAL_IMAGES", Path(__file__).parents[3] / "shared/data/magnetic_tile"))

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def glad(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_bundle, photos, ray_session):
    """The same archive scored three ways; {(batch size, actors): {image id: row}}."""
    found = {}
    for batch_size, actors in ((1, 1), (1, 2), (5, 1)):
        out = tmp_path_factory.mktemp("runs") / "out"
        outcome = glad(
            "score", photos, "--model", tiny_bundle, "--out", out, "--batch-size", batch_size, "--actors", actors
        )
        assert outcome.exit_code == 0, outcome.output
        rows = pq.read_table(out / "results").to_pylist()
        assert len(rows) == 12
        found[batch_size, actors] = {row["image_id"]: row for row in rows}
    return found


def test_one_batch_shape_is_bitwise_the_same_on_any_number_of_actors(runs):
    one, two = runs[1, 1], runs[1, 2]
    assert one.keys() == two.keys()
    for image_id, row in one.items():
        ours, theirs = ({k: v for k, v in r.items() if k != "seconds"} for r in (row, two[image_id]))
        assert ours == theirs


def test_batch_size_and_order_change_nothing_but_rounding(runs):
    one, five = runs[1, 1], runs[5, 1]
    assert one.keys() == five.keys()
    for image_id, row in one.items():
        other = five[image_id]
        assert other["stop_step"] == row["stop_step"]
        assert other["score"] == pytest.approx(row["score"], abs=1e-4)
    assert len({row["stop_step"] for row in one.values()}) > 1, "images should stop at different steps here"


def test_broken_files_are_errors_and_the_job_goes_on(tmp_path, tiny_bundle, photos):
    archive = tmp_path / "archive"
    shutil.copytree(photos, archive)
    (archive / "empty.png").write_bytes(b"")
    (archive / "text.jpg").write_text("not a picture")
    whole = (photos / "left" / "01.png").read_bytes()
    (archive / "torn.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(archive / "deep.png")
    out = tmp_path / "out"

    words = ["score", archive, "--model", tiny_bundle, "--out", out, "--actors", 1]
    outcome = glad(*words, "--reconstructions", "--maps", "full")
    assert outcome.exit_code == 0, outcome.output
    assert re.match(rf"model {tiny_bundle} \([0-9a-f]{{16}}\) for widget\n", outcome.stdout)
    run = json.loads((out / "run.json").read_text())
    assert run["counts"] | {"anomalies": 0} == {
        "images": 16,
        "scored": 13,
        "anomalies": 0,
        "errors": 3,
        "duplicates": 0,
        "blank": 0,
        "doubtful": 0,
        "left_out": {},
        "pages": 0,
    }
    results, errors = pq.read_table(out / "results"), pq.read_table(out / "errors")
    kinds = {row["uri"].rsplit("/", 1)[1]: row["error_type"] for row in errors.to_pylist()}
    assert kinds == {"empty.png": "empty", "text.jpg": "not_an_image", "torn.png": "damaged"}
    assert run["counts"]["anomalies"] == sum(results["is_anomalous"].to_pylist())
    assert "errors" in outcome.stdout
    assert "13" not in outcome.stderr

    sheet = tmp_path / "sheet.png"
    shown = glad("show", out, "--top", 3, "--out", sheet)
    assert shown.exit_code == 0, shown.output
    assert np.asarray(Image.open(sheet).convert("L")).std() > 10  # pictures, not a blank page

    again = glad(*words)
    assert again.exit_code == 2
    assert "maps was full, now token" in again.stderr
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = glad(*words, "--reconstructions", "--maps", "full")
    assert again.exit_code == 0, again.output
    assert "complete" in again.stdout
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    stopped = glad(*words, "--overwrite", "--max-errors", 2)
    assert stopped.exit_code == 1
    assert "--max-errors 2" in stopped.stderr
    assert all_cpus_free()
    assert not (out / "run.json").exists()


@pytest.mark.skipif(not TILES.is_dir(), reason=f"{TILES} is not here (GLAD_REAL_IMAGES names another place)")
def test_a_folder_that_grows_is_one_run(tmp_path, tiny_bundle, monkeypatch):
    source, out = tmp_path / "photos", tmp_path / "out"

    def score(*options):
        outcome = glad("score", source, "--model", tiny_bundle, "--out", out, "--actors", 1, *options)
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    def names(run):
        tables = (run.results(), run.errors())
        return sorted(Path(uri).name for table in tables for uri in table.to_table(["uri"])["uri"].to_pylist())

    for index in range(9):
        photo(index, source / f"{index}.png")
    assert "no new" not in score("--new")  # the same command begins the run
    photo(20, source / "20.png")
    (source / "broken.png").write_bytes(b"\x89PNG")
    os.utime(source / "broken.png", (0, 0))
    os.utime(source / "3.png", (0, 0))
    with monkeypatch.context() as patched:  # a job that stops when its plan is in force
        patched.setattr(job, "run_dataflow", lambda *_: (_ for _ in ()).throw(GladError("stopped")))
        assert glad("score", source, "--model", tiny_bundle, "--out", out, "--new").exit_code == 2
    assert json.loads(glad("status", out, "--json").stdout)["state"] == "unfinished"
    photo(21, source / "21.png")
    shown = score("--new")  # completes what was begun, and goes on to what has come meanwhile
    assert "2 new images" in shown
    assert "1 new images" in shown
    assert "1 judged before, changed since, and not judged again" in shown
    line = score("--new")
    assert re.fullmatch(r"no new pictures since \d{4}-\d\d-\d\d \d\d:\d\d UTC; 1 judged before, .*\n", line)
    run = Run.at(str(out))
    assert names(run) == sorted(["broken.png", *(f"{index}.png" for index in (*range(9), 20, 21))])
    assert (run.record["counts"]["images"], run.record["counts"]["errors"], run.record["judged"]) == (12, 1, 1)
    assert len(run.manifest_rows(run.results().to_table(["image_id"])["image_id"].to_pylist())) == 11
    status = json.loads(glad("status", out, "--json").stdout)
    assert (status["state"], status["images"], status["done"]) == ("complete", 12, 12)
    assert glad("score", source, "--model", tiny_bundle, "--out", out, "--new", "--seed", 1).exit_code == 2
    with one_at_a_time(run):
        assert "another `glad score --new` is at work" in score("--new")


def test_real_photos_from_a_list(tmp_path, tiny_bundle):
    files = [path for defect in sorted(TILES.joinpath("test").iterdir()) for path in sorted(defect.iterdir())[:1]]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in files))
    outcome = glad("score", tmp_path / "list.txt", "--model", tiny_bundle, "--out", tmp_path / "out", "--actors", 1)
    assert outcome.exit_code == 0, outcome.output
    rows = pq.read_table(tmp_path / "out" / "results").to_pylist()
    assert sorted(row["uri"] for row in rows) == sorted(map(str, files))
    for row in rows:
        with Image.open(row["uri"]) as image:
            assert (row["width"], row["height"]) == image.size


def test_mistakes_the_remote_listing_finds_are_one_line_and_leave_the_folder_free(tmp_path, tiny_bundle, photos):
    out = tmp_path / "out"
    for source, words in ((photos, ["--category", "bottle"]), (tmp_path, [])):
        (tmp_path / "empty").mkdir(exist_ok=True)
        source = tmp_path / "empty" if source == tmp_path else source
        outcome = glad("score", source, "--model", tiny_bundle, "--out", out, *words)
        assert outcome.exit_code == 2, outcome.output
        assert outcome.stderr.startswith("Error: ")
        assert outcome.stderr.count("\n") == 1
        assert str(source) in outcome.stderr
    assert list(out.iterdir()) == []


def test_a_damaged_bundle_is_one_line_though_the_actor_finds_it(tmp_path, tiny_bundle, photos):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    weights = bundle / "unet" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1  # same size: only the checksum, taken where the model is loaded, can tell
    weights.write_bytes(changed)
    logged = BufferingHandler(1000)
    logging.getLogger("ray.data").addHandler(logged)
    outcome = glad("score", photos, "--model", bundle, "--out", tmp_path / "out", "--actors", 1)
    logging.getLogger("ray.data").removeHandler(logged)
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1
    assert "sha256" in outcome.stderr
    assert [record for record in logged.buffer if record.exc_info] == []  # Ray Data would print two tracebacks


def test_the_nearest_neighbour_yardstick_runs_through_the_same_job(tmp_path, photos, tiny_bundle, ray_session):
    def score(*more):
        arguments = ["score", str(photos), "--model", str(tiny_bundle), "--out", str(tmp_path / "run"), *map(str, more)]
        return CliRunner().invoke(app, arguments)

    refused = score("--method", "nearest")
    assert refused.exit_code == 2
    assert "--good" in refused.stderr
    outcome = score("--method", "nearest", "--good", photos / "left", "--actors", 1)
    assert outcome.exit_code == 0, outcome.output
    rows = pq.read_table(tmp_path / "run" / "results").to_pylist()
    assert len(rows) == 12
    assert {row["stop_reason"] for row in rows} == {"none"}
    assert {row["threshold"] for row in rows} == {None}  # of six images: too few for 5 %
    remembered = [row["score"] for row in rows if "/left/" in row["uri"]]
    assert max(remembered) < min(row["score"] for row in rows if "/right/" in row["uri"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["method"] == "nearest"
    assert (
        f"{photos / 'left'}: 6 good images, 6 of them judged for the threshold, too few for one: give 19\n"
        in outcome.stdout
    )
    calibrated = ["calibrate", "--run", tmp_path / "run", "--model", tiny_bundle, "--out", tmp_path / "x"]
    refused = CliRunner().invoke(app, [*map(str, calibrated), "--threshold-only"])
    assert "was judged by images of --good, not by a bundle: score without --good" in refused.stderr
