"""docs/results-schema.md: its tables are the schema, its examples run, on a run of `glad score`, local and on S3."""

import json
import re
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from conftest import make_bucket
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.cli.main import app
from pipelines.runs.schema import ERRORS_SCHEMA, RESULTS_SCHEMA

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs/results-schema.md").read_text()
BLOCKS = re.findall(r"^```(\w+(?: \w+)?)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def monday(tmp_path_factory, tiny_bundle, photos, ray_session):
    """A folder with a run called monday in it: twelve photos, two files that are none."""
    folder = tmp_path_factory.mktemp("schema")
    for index, photo in enumerate(sorted(photos.rglob("*.png"))):
        copy = folder / "photos" / f"{index}.png"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(photo.read_bytes())
    (folder / "photos/empty.png").write_bytes(b"")
    (folder / "photos/page.png").write_bytes(b"<html>")
    words = ["score", folder / "photos", "--model", tiny_bundle, "--out", folder / "monday", "--actors", 1]
    outcome = CliRunner().invoke(app, [str(word) for word in words])
    assert outcome.exit_code == 0, outcome.output
    return folder


def documented(heading):
    """First and second cell of the rows of the table below a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [(cells[1].strip(), cells[2].strip()) for line in section.splitlines() if (cells := line.split("|"))[2:]][2:]


@pytest.mark.parametrize(("heading", "schema"), [("results", RESULTS_SCHEMA), ("errors", ERRORS_SCHEMA)])
def test_the_tables_are_the_schema(heading, schema):
    def name(kind):
        words = (
            str(kind).replace("item: ", "").replace("element: ", "").replace(": ", " ").replace("halffloat", "float16")
        )
        return re.sub(r"\bfloat\b", "float32", words)

    assert documented(heading) == [(f"`{field.name}`", name(field.type)) for field in schema]


def test_every_key_of_run_json_is_there(monday):
    named = {key for cell, _ in documented("run.json") for key in re.findall(r"`(\w+)`", cell)}
    assert named == set(json.loads((monday / "monday/run.json").read_text()))


def test_the_examples_run_and_agree(monday, monkeypatch):
    monkeypatch.chdir(monday)
    results = pd.read_parquet("monday/results")
    queries = [duckdb.sql(text).df() for kind, text in BLOCKS if kind == "sql"]
    anomalies, by_category, steps, errors = queries
    assert 0 < len(anomalies) == results.is_anomalous.sum() < len(results) == 12
    assert by_category.images.sum() == 12
    assert len(steps) == results.steps.map(len).sum() > 12
    assert set(errors.error_type) == {"empty", "not_an_image"}

    in_pandas, in_polars, of_map = (run(text) for kind, text in BLOCKS if kind == "python")
    assert list(in_pandas["worst"].uri) == list(anomalies.uri) == list(in_polars["worst"]["uri"])
    assert len(in_pandas["steps"]) == len(in_polars["steps"]) == len(steps)
    assert in_pandas["steps"].score.sum() == pytest.approx(in_polars["steps"]["score"].sum())
    assert of_map["row"].uri == anomalies.uri[0]
    assert of_map["small"].shape == (4, 4)
    assert of_map["full"].shape == (32, 32)
    assert of_map["score"] == pytest.approx(of_map["row"].score, rel=1e-3)


def test_the_examples_read_from_s3(monday, s3_server, monkeypatch):
    for name, value in (s3_server | {"AWS_ALLOW_HTTP": "true"}).items():
        monkeypatch.setenv(name, value)
    make_bucket(s3_server, "verdicts")
    storage = Storage.from_environment()
    for path in (monday / "monday").rglob("*.parquet"):
        storage.write(f"s3://verdicts/monday/{path.relative_to(monday / 'monday')}", path.read_bytes())
    (names,) = (run(text) for kind, text in BLOCKS if kind == "python s3")
    assert len(names["images"]) == 12
    assert names["best"].item() == names["images"].score.min()
    assert names["worst"] == [(names["images"].score.max(),)]


def run(text):
    """The names a block leaves."""
    names = {}
    exec(compile(text, "docs/results-schema.md", "exec"), names)
    return names
