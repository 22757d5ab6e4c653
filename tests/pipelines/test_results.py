import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage, StorageError
from glad_core.errors import GladError
from pipelines.results import (
    ERRORS_SCHEMA,
    RESULTS_SCHEMA,
    SCORED_SCHEMA,
    claim,
    complete,
    read_run,
    release,
    write_results,
)

STORAGE = Storage()


def scored(image_id, anomalous=True):
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
    }


def failed(image_id):
    return {"image_id": image_id, "uri": f"/{image_id}", "stage": "decode", "error_type": "damaged", "message": "why"}


def test_a_block_is_split_into_results_and_errors_and_answers_with_counts(tmp_path):
    rows = pa.Table.from_pylist([scored("a"), failed("b"), scored("c", False), scored("d", None)], schema=SCORED_SCHEMA)
    stage = write_results(STORAGE, str(tmp_path))
    assert stage(rows).to_pylist() == [{"scored": 3, "anomalies": 1, "errors": 1}]
    results, errors = pq.read_table(tmp_path / "results"), pq.read_table(tmp_path / "errors")
    assert results.schema.equals(RESULTS_SCHEMA)
    assert errors.schema.equals(ERRORS_SCHEMA)
    assert results["image_id"].to_pylist() == ["a", "c", "d"]
    first = results.to_pylist()[0]
    assert first["anomaly_map"] == [0, 0.125, 0.25, 0.375, 0.5, 0.625]
    assert first["steps"] == [{"timestep": 401, "score": 0.25}]
    assert errors.to_pylist() == [failed("b")]


def test_a_retried_block_replaces_its_own_file(tmp_path):
    rows = pa.Table.from_pylist([scored("a"), scored("b")], schema=SCORED_SCHEMA)
    stage = write_results(STORAGE, str(tmp_path))
    stage(rows)
    stage(rows)
    stage(rows.slice(0, 0))
    assert len(list((tmp_path / "results").iterdir())) == 1
    assert not (tmp_path / "errors").exists()


def test_a_run_claims_its_folder_once_and_overwrite_spares_what_is_not_a_run(tmp_path):
    out = str(tmp_path / "out")
    claim(out, STORAGE, overwrite=False)
    with pytest.raises(GladError, match=r"unfinished run.*--overwrite"):
        claim(out, STORAGE, overwrite=False)
    (tmp_path / "out" / "mine.txt").write_text("keep")
    complete(out, STORAGE, {"counts": {"scored": 0, "errors": 0}})
    with pytest.raises(GladError, match=r"another run's results.*--overwrite"):
        claim(out, STORAGE, overwrite=False)
    claim(out, STORAGE, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine.txt", "started.json"]
    release(out, STORAGE)
    claim(out, STORAGE, overwrite=False)


def test_a_complete_run_has_both_datasets_even_if_empty(tmp_path):
    with pytest.raises(GladError, match="no finished run"):
        read_run(str(tmp_path), STORAGE)
    complete(str(tmp_path), STORAGE, {"counts": {"scored": 0, "errors": 0}})
    assert pq.read_table(tmp_path / "results").schema.equals(RESULTS_SCHEMA)
    assert len(pq.read_table(tmp_path / "errors")) == 0
    assert read_run(str(tmp_path), STORAGE)["counts"] == {"scored": 0, "errors": 0}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(GladError, match="damaged"):
        read_run(str(tmp_path), STORAGE)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "sub", "/proc/glad-out"):
        with pytest.raises(StorageError, match=r"in the way|cannot be written"):
            claim(str(out), STORAGE, overwrite=False)
