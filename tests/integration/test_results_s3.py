"""What reads a run and writes a page, a picture or tables, with all of them on a real S3 server."""

import json
from pathlib import Path

import pytest
from conftest import make_bucket
from judged_run import make_judged_run
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.cli.main import app

pytestmark = pytest.mark.slow


def glad(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_output_of_a_run_on_s3_goes_to_s3(tiny_bundle, s3_server, ray_session, tmp_path, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    make_bucket(s3_server, "readers")
    storage, run, data = Storage.from_environment(), "s3://readers/run", "s3://readers/data"
    judged = make_judged_run(tmp_path, tiny_bundle)
    storage.publish(Path(judged.run.location), run, "run.json")
    for path, _ in storage.walk(str(judged.data)):
        storage.write(f"{data}/{path}", (judged.data / path).read_bytes())
    before = set(tmp_path.iterdir())
    for words, files in (
        (["report", run, "--out", f"{run}.html", "--dataset", data], {f"{run}.html": b"<!DOCTYPE html>"}),
        (["show", run, "--out", "s3://readers/new/sheet.png", "--top", 2], {"s3://readers/new/sheet.png": b"\x89PNG"}),
        (["drift", run, run, "--out", "s3://readers/drift.png"], {"s3://readers/drift.png": b"\x89PNG"}),
        (
            ["evaluate", run, "--dataset", data, "--out", "s3://readers/tables/"],
            {f"s3://readers/tables/metrics.{kind}": b"" for kind in ("csv", "json", "md")},
        ),
    ):
        outcome = glad(*words)
        assert outcome.exit_code == 0, outcome.output
        for file, begin in files.items():
            assert storage.read(file)[: len(begin)].upper() == begin.upper()
    assert {"bottle", "cable", "average"} == json.loads(storage.read("s3://readers/tables/metrics.json"))["ours"].keys()
    assert set(tmp_path.iterdir()) == before  # no local folder called "s3:"


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--out", "s3://b/demo"],
        ["demo-data", "s3://b/demo"],
        ["bundle", "create", "folder", "--out", "s3://b/x"],
        ["bundle", "import-unet", "s3://b/base", "checkpoint", "--out", "x"],
        ["bundle", "import-unet", "base", "s3://b/checkpoint", "--out", "x"],
        ["report", "s3:/b/run"],
        ["show", "run", "--out", "file:sheet.png"],
        ["calibrate", "photos", "--model", "small", "--out", "gs://b/x"],
    ],
)
def test_a_location_that_a_command_does_not_take_is_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = glad(*words)
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
