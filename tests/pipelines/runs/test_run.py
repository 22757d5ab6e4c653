"""A run folder as its readers meet it: finished, unfinished, damaged, with one bundle or one for each category."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from glad_core.scoring import full_size_map
from pipelines.archive.manifest import MANIFEST_SCHEMA
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS_SCHEMA, RESULTS_SCHEMA

SETTINGS = {"resolution": 32, "feature_resolution": 32, "blur_sigma": 1.0}


def finished(folder, models) -> Run:
    """A finished run of one result and one error."""
    for name, schema, image_id in (("results", RESULTS_SCHEMA, "a"), ("errors", ERRORS_SCHEMA, "b")):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([{"image_id": image_id}], schema=schema), folder / name / "part-0.parquet")
    (folder / "manifest").mkdir()
    rows = [{"image_id": name, "uri": f"/{name}.png"} for name in "abc"]
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), folder / "manifest" / "part-0.parquet")
    (folder / "run.json").write_text(json.dumps({"models": models, "counts": {"scored": 1, "errors": 1}}))
    return Run.at(f"{folder}/")


def test_a_finished_run_is_read_back(tmp_path):
    run = finished(tmp_path / "run", {"": {"settings": SETTINGS}})
    assert run.location == str(tmp_path / "run")
    assert run.path("results", "x") == str(tmp_path / "run/results/x")
    assert run.results().to_table()["image_id"].to_pylist() == ["a"]
    assert run.errors().to_table()["image_id"].to_pylist() == ["b"]
    assert {key: row["uri"] for key, row in run.manifest_rows(["a", "c", "z"]).items()} == {
        "a": "/a.png",
        "c": "/c.png",
    }
    assert run.manifest_rows([]) == {}
    assert run.settings_of("anything") == Settings(**SETTINGS)
    assert pickle.loads(pickle.dumps(run)).record == run.record


def test_columns_that_an_older_version_did_not_write_are_null(tmp_path):
    run = finished(tmp_path / "run", {})
    older = pa.Table.from_pylist([{"image_id": "a"}], schema=RESULTS_SCHEMA).drop_columns(["p_value", "doubt", "tiles"])
    pq.write_table(older, tmp_path / "run/results/part-0.parquet")
    (row,) = run.results().to_table().to_pylist()
    assert (row["image_id"], row["p_value"], row["doubt"], row["tiles"]) == ("a", None, None, None)


@pytest.mark.parametrize("trouble", ["gone", "emptied", "no Parquet", "cut off"])
def test_a_manifest_that_is_gone_or_damaged_is_one_line(tmp_path, trouble):
    run = finished(tmp_path / "run", {})
    part = tmp_path / "run/manifest/part-0.parquet"
    damaged = {"no Parquet": b"a text, not a table", "cut off": part.read_bytes()[:-30]}.get(trouble)
    part.unlink()
    if damaged:
        part.write_bytes(damaged)
    if trouble == "gone":
        part.parent.rmdir()
    with pytest.raises(GladError, match="run/manifest: gone or damaged, so") as error:
        run.manifest_rows(["a"])
    assert "\n" not in str(error.value)


def test_files_that_were_deleted_or_added_since_are_noticed_and_foreign_ones_are_not_read(tmp_path):
    run = finished(tmp_path / "run", {})
    size = (tmp_path / "run/results/part-0.parquet").stat().st_size
    counted = {"results": {"files": 1, "bytes": size}}
    (tmp_path / "run/run.json").write_text(json.dumps({"files": counted}))
    (tmp_path / "run/results/Thumbs.db").write_text("a thumbnail")
    assert Run.at(run.location).results().count_rows() == 1
    (tmp_path / "run/results/part-0 copy.parquet").write_text("a copy")
    with pytest.raises(GladError, match=r"results holds 2 files.*counts 1 of"):
        Run.at(run.location).results()
    (tmp_path / "run/results/part-0 copy.parquet").unlink()
    (tmp_path / "run/results/part-0.parquet").unlink()
    with pytest.raises(GladError, match="the same `glad score` command mends it"):
        Run.at(run.location).errors()


def test_a_map_of_token_resolution_is_enlarged_as_for_the_score_and_a_full_one_is_kept(tmp_path):
    torch = pytest.importorskip("torch")
    run = finished(tmp_path / "run", {"": {"settings": SETTINGS}})
    small = np.arange(16, dtype=np.float32).reshape(4, 4)
    row = {"category": None, "map_height": 4, "map_width": 4, "anomaly_map": small.ravel().tolist()}
    expected = full_size_map(torch.from_numpy(small)[None], Settings(**SETTINGS))[0].numpy()
    np.testing.assert_array_equal(run.full_map(row), expected)
    whole = np.random.default_rng(0).random((32, 32), np.float32)
    row = {"category": None, "map_height": 32, "map_width": 32, "anomaly_map": whole.ravel()}
    np.testing.assert_array_equal(run.full_map(row), whole)


def test_each_category_has_its_own_settings(tmp_path):
    run = finished(
        tmp_path / "run", {"nut": {"settings": SETTINGS}, "bolt": {"settings": SETTINGS | {"blur_sigma": 3}}}
    )
    assert run.settings_of("bolt").blur_sigma == 3
    assert run.settings_of("nut").blur_sigma == 1
    with pytest.raises(GladError, match="names no model for category 'screw'"):
        run.settings_of("screw")


def test_a_folder_without_a_finished_run_is_refused_by_every_reader(tmp_path):
    with pytest.raises(GladError, match="no finished run there"):
        Run.at(str(tmp_path)).results()
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(GladError, match=r"not finished.*the same `glad score` command resumes it"):
        Run.at(str(tmp_path)).errors()
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(GladError, match="damaged"):
        _ = Run.at(str(tmp_path)).record
