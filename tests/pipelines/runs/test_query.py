"""Searches of results against sorting and filtering them in memory."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from judged_run import make_judged_run

from pipelines.runs import query
from pipelines.runs.query import Query, read_rows, search
from pipelines.runs.schema import RESULTS_SCHEMA


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_bundle):
    return make_judged_run(tmp_path_factory.mktemp("query"), tiny_bundle)


@pytest.mark.parametrize("sort", get_args(query.Sort))
def test_pages_of_a_search_are_the_sorted_results(judged, monkeypatch, sort) -> None:
    rows = judged.rows
    monkeypatch.setattr(query, "HELD", 5)  # so that candidates are dropped on the way
    results = judged.run.results()
    key = {
        "margin": lambda row: -np.float32(row["score"]) / np.float32(row["threshold"]),
        "margin_up": lambda row: np.float32(row["score"]) / np.float32(row["threshold"]),
        "step": lambda row: -row["stop_step"],
        "name": lambda row: row["uri"],
        "seconds": lambda row: -row["seconds"],
    }[sort]
    # Of equals the higher id comes first.
    expected = [row["image_id"] for row in sorted(rows, key=lambda row: (key(row), -int(row["image_id"])))]
    pages = [
        search(judged.run, results, Query(sort=sort, first=first, count=7)) for first in range(0, len(rows) + 7, 7)
    ]
    assert [total for total, _ in pages] == [len(rows)] * len(pages)
    listed = [result for _, page in pages for result in page]
    assert [result.image_id for result in listed] == expected
    assert [row["image_id"] for row in read_rows(results, listed[3:9], ["image_id"])] == expected[3:9]


@pytest.mark.parametrize(
    ("standardised", "ratios", "expected"),
    [
        ((), {"a": 1.5, "b": 2.1, "d": 1.3}, "cbadef"),
        (("nut",), {"b": 2.1, "d": 1.3}, "cbadef"),
        (("",), {}, "bcadef"),
    ],
)
def test_a_standardised_score_is_not_divided_by_its_threshold(standardised, ratios, expected) -> None:
    """Nor any by a threshold of 0 or less: the more anomalous would come last."""
    rows = [("a", "nut", 3.0, 2.0), ("b", "bolt", 4.2, 2.0), ("c", "nut", 0.5, -0.75), ("d", "bolt", 2.6, 2.0)]
    rows += [("e", "nut", 0.25, 0.0), ("f", "nut", -1.0, -0.75)]
    names = ("image_id", "category", "score", "threshold")
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=RESULTS_SCHEMA)
    run, results = SimpleNamespace(standardised=frozenset(standardised)), pads.dataset(table)
    columns = {"id": pads.field("image_id"), "ratio": query.ratio(run), "margin": query.margin(run)}
    read = {row["id"]: row for row in results.to_table(columns=columns).to_pylist()}
    assert {name: row["ratio"] for name, row in read.items() if row["ratio"] is not None} == pytest.approx(ratios)
    assert [row["margin"] > 1 for row in read.values()] == [score > threshold for _, _, score, threshold in rows]
    assert "".join(sorted(read, key=lambda name: -read[name]["margin"])) == expected


def test_filters_together(judged) -> None:
    filters = {"text": "CUT", "category": "bottle", "verdict": "anomalous", "reason": "difference"}
    total, matches = search(judged.run, judged.run.results(), Query(**filters, low=1.2, high=2.5, count=99))
    expected = {
        row["image_id"]
        for row in judged.rows
        if "/bottle/test/cut/" in row["uri"] and row["is_anomalous"] and row["stop_reason"] == "difference"
        if 1.2 <= np.float32(row["score"]) <= 2.5
    }
    assert {match.image_id for match in matches} == expected
    assert total == len(expected)
    assert 0 < total < 11


def test_marks_filter_results(judged) -> None:
    ids = [row["image_id"] for row in judged.rows]
    marks = {ids[3]: "confirmed", ids[5]: "false_alarm"}
    for mark, expected in (
        ("confirmed", {ids[3]}),
        ("false_alarm", {ids[5]}),
        ("unmarked", set(ids) - {ids[3], ids[5]}),
    ):
        _, matches = search(judged.run, judged.run.results(), Query(mark=mark, count=99), marks)
        assert {match.image_id for match in matches} == expected


def test_a_result_that_is_not_there_is_a_key_error(judged) -> None:
    _, (result,) = search(judged.run, judged.run.results(), Query(count=1))
    with pytest.raises(KeyError):
        read_rows(judged.run.results(), [result.model_copy(update={"image_id": "x"})])
