"""Runs of older versions may hold scores that are NaN or infinite: every reader counts them and says so."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from judged_run import make_judged_run
from starlette.testclient import TestClient
from typer.testing import CliRunner

from pipelines.archive.layouts import read_dataset
from pipelines.cli.main import app
from pipelines.evaluate.tally import count_batch, unpack
from pipelines.report.server import make_app
from pipelines.report.totals import count
from pipelines.runs.query import Query, search

BAD = {0: float("nan"), 1: float("inf"), 31: float("-inf"), 32: float("nan")}  # by the number of the result


@pytest.fixture(scope="module")
def undecided(tmp_path_factory, tiny_bundle):
    """A judged run in which the scores and maps of four of 60 results are not finite; is_anomalous stays as it was."""
    judged = make_judged_run(tmp_path_factory.mktemp("judged"), tiny_bundle)
    for file in Path(judged.run.location, "results").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        rows = table.to_pylist()
        for row in rows:
            if (number := int(row["image_id"])) in BAD:
                row["score"] = BAD[number]
                row["anomaly_map"] = np.full(len(row["anomaly_map"]), BAD[number], np.float16)
                row["steps"] = [step | {"score": BAD[number]} for step in row["steps"]]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    record = Path(judged.run.location, "run.json")
    older = {key: value for key, value in json.loads(record.read_text()).items() if key != "files"}
    record.write_text(json.dumps(older))
    return judged


@pytest.fixture(scope="module")
def none_decided(tmp_path_factory, undecided):
    """A run without any finite score."""
    import shutil

    folder = shutil.copytree(undecided.run.location, tmp_path_factory.mktemp("none") / "run")
    for file in Path(folder, "results").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        scores = pa.array([float("nan")] * len(table), pa.float32())
        pq.write_table(table.set_column(table.schema.get_field_index("score"), "score", scores), file)
    return folder


def glad(*words):
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})


def test_totals_count_them_apart(undecided) -> None:
    totals = count(undecided.run, undecided.run.results())
    assert totals.kind_counts["undecided"] == 4
    assert sum(totals.kind_counts.values()) == 60
    assert sum(part["count"] for part in totals.histogram()) == 56
    assert np.isfinite([totals.heat_scale().low, totals.heat_scale().high]).all()


def test_a_search_has_them_last_and_under_no_verdict(undecided) -> None:
    results = undecided.run.results()
    bad = {f"{number:032d}" for number in BAD}
    for sort in ("margin", "margin_up"):
        total, keys = search(undecided.run, results, Query(sort=sort, count=60))
        assert total == 60
        assert {key.image_id for key in keys[-4:]} == bad
    found = [search(undecided.run, results, Query(verdict=verdict, count=60))[1] for verdict in ("good", "anomalous")]
    assert sum(map(len, found)) == 56
    assert not bad & {key.image_id for keys in found for key in keys}


def test_the_report_says_how_many(undecided, tmp_path) -> None:
    outcome = glad("report", undecided.run.location, "--out", tmp_path / "report.html")
    assert outcome.exit_code == 0, outcome.output
    assert "4 results have no finite score: undecided" in outcome.stdout
    page = (tmp_path / "report.html").read_text()
    assert "undecided, without a score" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    cards = [card for card in data["cards"] if not card["decided"]]
    assert len(cards) == 4
    assert all(card["score"] is card["anomalous"] is card["margin"] is None for card in cards)


def test_the_server_shows_them(undecided) -> None:
    client = TestClient(make_app(undecided.run), base_url="http://127.0.0.1")
    assert "undecided, without a score" in client.get("/").text
    cards = client.get("/api/cards", params={"sort": "margin", "first": 50, "count": 10}).json()["cards"]
    assert [card["decided"] for card in cards] == [True] * 6 + [False] * 4


def test_the_sheet_leaves_them_out(undecided, none_decided, tmp_path) -> None:
    outcome = glad("show", undecided.run.location, "--top", 60, "--out", tmp_path / "sheet.png")
    assert outcome.exit_code == 0, outcome.output
    assert "4 results have no finite score: undecided, not shown" in outcome.stdout
    assert "56 images in" in outcome.stdout
    outcome = glad("show", none_decided, "--out", tmp_path / "none.png")
    assert outcome.exit_code == 2
    assert outcome.stderr.count("\n") == 1


def test_a_report_without_any_score(none_decided, tmp_path) -> None:
    outcome = glad("report", none_decided, "--out", tmp_path / "report.html")
    assert outcome.exit_code == 0, outcome.output
    assert "60 results have no finite score" in outcome.stdout


def test_drift_leaves_them_out(undecided, none_decided) -> None:
    outcome = glad("drift", undecided.run.location, undecided.run.location)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.count("4 results have no finite score: left out") == 2
    outcome = glad("drift", undecided.run.location, none_decided)
    assert outcome.exit_code == 2
    assert "no category in common" in outcome.stderr


def test_metrics_leave_them_out(undecided) -> None:
    table = undecided.run.results().to_table()
    columns = ["uri", "category", "score", "anomaly_map", "map_height", "map_width", "height", "width"]
    batch = {name: np.array([*table[name].to_pylist(), None], object)[:-1] for name in columns}
    examples = read_dataset(str(undecided.data), undecided.run.storage)
    tallies = unpack(count_batch(batch, undecided.run, examples)["tallies"][0])
    assert sum(tally.undecided for tally in tallies.values()) == 4
    assert sum(len(tally.images) for tally in tallies.values()) == 56
    for tally in tallies.values():
        assert all(np.isfinite(value) for name, value in tally.metrics().items() if name != "AUPIMO")


def test_no_threshold_comes_from_such_a_run(undecided, tiny_bundle, tmp_path) -> None:
    options = ["--model", tiny_bundle, "--out", tmp_path / "x", "--threshold-only"]
    outcome = glad("calibrate", "--run", undecided.run.location, *options)
    assert outcome.exit_code == 2
    assert "4 images have no finite score, such as " in outcome.stderr
    assert not (tmp_path / "x").exists()
