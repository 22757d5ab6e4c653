import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from glad_core.errors import GladError
from pipelines.runs.commits import sweep
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS_SCHEMA, RESULTS_SCHEMA, SCORED_SCHEMA
from pipelines.runs.write import ResultsWriter, complete, folder_of


def scored(image_id, anomalous=True, position=0):
    anomaly_map = np.arange(6, dtype=np.float16) / 8
    return {
        "image_id": image_id,
        "uri": f"/{image_id}.png",
        "score": 1.5,
        "is_anomalous": anomalous,
        "stop_step": None,
        "stop_reason": "none",
        "steps": [{"timestep": 401, "score": 0.25}],
        "anomaly_map": anomaly_map,
        "map_height": 2,
        "map_width": 3,
        "position": position,
    }


def failed(image_id, position=0):
    row = {"image_id": image_id, "uri": f"/{image_id}", "stage": "decode", "error_type": "damaged", "message": "why"}
    return row | {"position": position}


def test_a_block_is_split_by_shard_into_results_and_errors_and_says_what_it_wrote(tmp_path):
    rows = [scored("a", position=2), failed("b", 3), scored("c", False, 4), scored("d", None, 5)]
    stage = ResultsWriter(Run.at(str(tmp_path)), 4, "try1")
    first, second = stage(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA)).to_pylist()
    assert {name: first[name] for name in ("shard", "scored", "anomalies", "errors")} == {
        "shard": 0,
        "scored": 1,
        "anomalies": 1,
        "errors": 1,
    }
    assert (second["shard"], second["scored"], second["anomalies"], second["errors"]) == (1, 2, 0, 0)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
    assert files == {*first["files"], *second["files"]}
    assert all("try1" in file for file in files)
    results, errors = pq.read_table(tmp_path / "results"), pq.read_table(tmp_path / "errors")
    assert results.schema.equals(RESULTS_SCHEMA)
    assert errors.schema.equals(ERRORS_SCHEMA)
    assert sorted(results["image_id"].to_pylist()) == ["a", "c", "d"]
    row = results.to_pylist()[0]
    assert row["anomaly_map"] == [0, 0.125, 0.25, 0.375, 0.5, 0.625]
    assert row["steps"] == [{"timestep": 401, "score": 0.25}]
    assert errors.to_pylist() == [{name: failed("b")[name] for name in ERRORS_SCHEMA.names}]


def test_a_retried_block_replaces_its_own_file_and_no_other_attempt_s(tmp_path):
    rows = pa.Table.from_pylist([scored("a"), scored("b", position=1)], schema=SCORED_SCHEMA)
    stage = ResultsWriter(Run.at(str(tmp_path)), 8, "try1")
    assert stage(rows).to_pylist() == stage(rows).to_pylist()
    assert stage(rows.slice(0, 0)).num_rows == 0
    assert len(list((tmp_path / "results").iterdir())) == 1
    assert not (tmp_path / "errors").exists()
    ResultsWriter(Run.at(str(tmp_path)), 8, "try2")(rows)
    assert len(list((tmp_path / "results").iterdir())) == 2


ODD = ["bolt", "a=b", "../up", "_hidden", ".dot", "ü 日本", "x" * 300, "%", "%25"]


def test_each_category_has_a_folder_of_its_own_that_every_reader_finds(tmp_path):
    rows = [scored(str(n), position=n) | {"category": name} for n, name in enumerate([*ODD, None])]
    stage = ResultsWriter(Run.at(str(tmp_path)), 16, "try1")
    (shard,) = stage(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA)).to_pylist()
    assert shard["scored"] == len(rows)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet")} == set(shard["files"])
    folders = {path.name for path in (tmp_path / "results").iterdir() if path.is_dir()}
    assert len(folders) == len(ODD)
    assert {"bolt", "a%3Db", "%2E.%2Fup", "%5Fhidden", "ü 日本"} <= folders
    assert len(list((tmp_path / "results").glob("*.parquet"))) == 1
    expected = sorted((row["image_id"], row["category"]) for row in rows[:-1])
    for table in (pq.read_table(tmp_path / "results"), pads.dataset(tmp_path / "results").to_table()):
        assert table.schema.equals(RESULTS_SCHEMA)
        found = [(row["image_id"], row["category"]) for row in table.to_pylist()]
        assert sorted(row for row in found if row[1]) == expected
    assert sweep(Run.at(str(tmp_path)), []) == len(rows)  # nothing was committed
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_folder_s_name_belongs_to_one_category():
    assert len({folder_of(name) for name in [*ODD, "x" * 301, "ü" * 300, "ü" * 301]}) == len(ODD) + 3
    assert all(len(folder_of(name)[0].encode()) <= 255 for name in ["x" * 301, "=" * 300, "日" * 300])
    assert folder_of(None) == folder_of("") == ()


def test_a_complete_run_has_both_datasets_even_if_empty(tmp_path):
    with pytest.raises(GladError, match="no finished run"):
        _ = Run.at(str(tmp_path)).record
    (tmp_path / "started.json").write_text("{}")
    with pytest.raises(GladError, match="not finished"):
        _ = Run.at(str(tmp_path)).record
    complete(Run.at(str(tmp_path)), {"counts": {"scored": 0, "errors": 0}})
    assert pq.read_table(tmp_path / "results").schema.equals(RESULTS_SCHEMA)
    assert len(pq.read_table(tmp_path / "errors")) == 0
    assert Run.at(str(tmp_path)).record["counts"] == {"scored": 0, "errors": 0}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(GladError, match="damaged"):
        _ = Run.at(str(tmp_path)).record
