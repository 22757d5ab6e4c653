import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS_SCHEMA, FILE, RESULTS_SCHEMA, SCORED_SCHEMA
from pipelines.runs.write import ROW_GROUP_BYTES, ResultsWriter, folder_of


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
    stage = ResultsWriter(Run.at(str(tmp_path)), 4, 1, "staging/1-a")
    first, second = stage(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA)).to_pylist()
    assert {name: first[name] for name in ("shard", "scored", "anomalies", "errors")} == {
        "shard": 0,
        "scored": 1,
        "anomalies": 1,
        "errors": 1,
    }
    assert (second["shard"], second["scored"], second["anomalies"], second["errors"]) == (1, 2, 0, 0)
    staged = tmp_path / "staging/1-a"
    sizes = {str(path.relative_to(staged)): path.stat().st_size for path in staged.rglob("*.parquet")}
    assert sizes == {
        file: size for row in (first, second) for file, size in zip(row["files"], row["sizes"], strict=True)
    }
    assert all(FILE.fullmatch(file)[1] == "1" for file in sizes)
    assert first["staged"] == "staging/1-a"
    results, errors = pq.read_table(staged / "results"), pq.read_table(staged / "errors")
    assert results.schema.equals(RESULTS_SCHEMA)
    assert errors.schema.equals(ERRORS_SCHEMA)
    assert sorted(results["image_id"].to_pylist()) == ["a", "c", "d"]
    row = results.to_pylist()[0]
    assert row["anomaly_map"] == [0, 0.125, 0.25, 0.375, 0.5, 0.625]
    assert row["steps"] == [{"timestep": 401, "score": 0.25}]
    assert errors.to_pylist() == [{name: failed("b")[name] for name in ERRORS_SCHEMA.names}]


def test_a_repeated_call_never_touches_the_files_of_its_first_try(tmp_path):
    rows = pa.Table.from_pylist([scored("a"), scored("b", position=9)], schema=SCORED_SCHEMA)
    stage = ResultsWriter(Run.at(str(tmp_path)), 8, 1, "staging/1-a")
    first, second = stage(rows).to_pylist(), stage(rows).to_pylist()
    names = [file for row in [*first, *second] for file in row["files"]]
    assert len(set(names)) == len(names) == 6  # shard 0 has a file of each kind, so that both folders exist
    assert stage(rows.slice(0, 0)).num_rows == 0


ODD = ["bolt", "a=b", "../up", "_hidden", ".dot", "ü 日本", "x" * 300, "%", "%25"]


def test_each_category_has_a_folder_of_its_own_that_every_reader_finds(tmp_path):
    rows = [scored(str(n), position=n) | {"category": name} for n, name in enumerate([*ODD, None])]
    stage = ResultsWriter(Run.at(str(tmp_path)), 16, 1, "staging/1-a")
    (shard,) = stage(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA)).to_pylist()
    assert shard["scored"] == len(rows)
    staged = tmp_path / "staging/1-a"
    assert {str(path.relative_to(staged)) for path in staged.rglob("*.parquet")} == set(shard["files"])
    assert all(FILE.fullmatch(file) for file in shard["files"])
    folders = {path.name for path in (staged / "results").iterdir() if path.is_dir()}
    assert len(folders) == len(ODD)
    assert {"bolt", "a%3Db", "%2E.%2Fup", "%5Fhidden", "ü 日本"} <= folders
    assert len(list((staged / "results").glob("*.parquet"))) == 1
    expected = sorted((row["image_id"], row["category"]) for row in rows[:-1])
    for table in (pq.read_table(staged / "results"), pads.dataset(staged / "results").to_table()):
        assert table.schema.equals(RESULTS_SCHEMA)
        found = [(row["image_id"], row["category"]) for row in table.to_pylist()]
        assert sorted(row for row in found if row[1]) == expected


def test_a_folder_s_name_belongs_to_one_category():
    assert len({folder_of(name) for name in [*ODD, "x" * 301, "ü" * 300, "ü" * 301]}) == len(ODD) + 3
    assert all(len(folder_of(name)[0].encode()) <= 255 for name in ["x" * 301, "=" * 300, "日" * 300])
    assert folder_of(None) == folder_of("") == ()


def test_the_first_shard_has_both_datasets_even_if_one_has_no_row(tmp_path):
    stage = ResultsWriter(Run.at(str(tmp_path)), 4, 1, "staging/1-a")
    stage(pa.Table.from_pylist([failed("a")], schema=SCORED_SCHEMA))
    assert pq.read_table(tmp_path / "staging/1-a/results").schema.equals(RESULTS_SCHEMA)
    assert len(pq.read_table(tmp_path / "staging/1-a/results")) == 0
    assert len(pq.read_table(tmp_path / "staging/1-a/errors")) == 1


def test_every_reader_gets_the_same_maps_back_from_row_groups_of_bounded_size(tmp_path):
    maps = [np.random.default_rng(n).standard_normal(512 * 512).astype(np.float16) for n in range(20)]
    rows = [scored(str(n), position=n) | {"anomaly_map": values} for n, values in enumerate(maps)]
    rows[7] |= {"reconstruction": b"\x89PNG" * 100}
    stage = ResultsWriter(Run.at(str(tmp_path)), 32, 1, "staging/1-a")
    stage(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA))
    (file,) = (tmp_path / "staging/1-a/results").glob("*.parquet")
    expected = np.stack(maps)
    metadata = pq.ParquetFile(file).metadata
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    assert len(sizes) > 1
    assert max(sizes) <= 1.1 * ROW_GROUP_BYTES
    in_duckdb = duckdb.sql(f"SELECT anomaly_map, reconstruction FROM '{file}'").fetchnumpy()
    for column in (
        pq.read_table(file)["anomaly_map"].to_numpy(),
        pd.read_parquet(file)["anomaly_map"],
        pl.read_parquet(file)["anomaly_map"].to_numpy(),
        in_duckdb["anomaly_map"],
    ):
        assert np.array_equal(np.stack(list(column)).astype(np.float16), expected)
    assert in_duckdb["reconstruction"][7] == b"\x89PNG" * 100


def test_rows_in_any_order_keep_theirs_within_a_file(tmp_path):
    rows = [scored(str(n), position=n) | {"category": "ab"[n % 2]} for n in (5, 0, 3, 2, 1, 4)]
    rows[2] = failed("3", 3)
    stage = ResultsWriter(Run.at(str(tmp_path)), 4, 1, "staging/1-a")
    first, second = stage(pa.Table.from_pylist(rows, schema=SCORED_SCHEMA)).to_pylist()
    ids = [
        [pq.read_table(tmp_path / "staging/1-a" / file)["image_id"].to_pylist() for file in shard["files"]]
        for shard in (first, second)
    ]
    assert ids == [[["0", "2"], ["1"], ["3"]], [["5"], ["4"]]]
