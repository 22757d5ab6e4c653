import json
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.runs import status
from pipelines.runs.claim import claim, draft
from pipelines.runs.commits import Written, commit_shards, complete
from pipelines.runs.run import Run

A_FILE = "results/part-00000000-1-0123456789abcdef.parquet"


def glad(*arguments):
    return CliRunner().invoke(app, ["status", *map(str, arguments)])


def test_a_run_from_its_claim_to_its_end(tmp_path):
    out = str(tmp_path / "out")
    nothing = glad(out)
    assert nothing.exit_code == 2
    assert "no run was started there" in nothing.stderr

    run = Run.at(out)
    run.storage.write(run.path("manifest", "listing", "part-0.parquet"), b"")
    assert json.loads(glad(out, "--json").stdout) == {
        "state": "listing",
        "images": None,
        "done": 0,
        "anomalies": 0,
        "errors": 0,
        "shards": [0, None],
        "asked": None,
        "last_progress": None,
        "images_per_second": None,
        "seconds_left": None,
    }
    assert "listing" in glad(out).stdout
    identity = {"source": "/photos", "models": {"": "abc"}}
    plan = claim(run, 1, lambda listing: draft([20], listing, None, identity, 512))
    run.storage.write(run.path("staging/1-a", A_FILE), b"rows")
    half = Written(0, 3, 1, 1, "staging/1-a", (A_FILE,), (4,))
    commits = [
        commit for _, commit in commit_shards(run, plan, [half, replace(half, scored=4, errors=0, files=(), sizes=())])
    ]
    found = json.loads(glad(out, "--json").stdout)
    assert (found["state"], found["done"], found["anomalies"], found["errors"]) == ("unfinished", 8, 2, 1)
    assert found["shards"] == [1, 3]
    assert found["asked"] == identity
    assert "8 of 20 (40.0%)" in glad(out).stdout
    complete(run, plan, {0: commits[1]}, {"counts": {"scored": 0, "errors": 0}})
    assert "complete" in glad(out).stdout
    (tmp_path / "out/plan.json").write_text("{")
    assert "damaged" in glad(out).stderr


def commit(shard, at):
    return Written(shard, 10, 0, 0, "staging/1-a", (), (), at=at)


@pytest.mark.parametrize(
    ("times", "left", "rate", "seconds"),
    [([], 9, None, None), ([50.0], 9, None, None), ([50.0, 52.0, 54.0], 40, 5.0, 8.0), ([50.0, 60.0], 0, None, None)],
)
def test_the_pace_is_that_of_the_last_commits(times, left, rate, seconds):
    pace = status._pace([commit(shard, at) for shard, at in enumerate(times)], left)
    assert (pace["images_per_second"], pace["seconds_left"]) == (rate, seconds)
    shown = bool(times) and left > 0
    assert pace["last_progress"] == ("1970-01-01T00:00:54+00:00" if len(times) == 3 else pace["last_progress"])
    assert (pace["last_progress"] is not None) == shown


@pytest.mark.parametrize(
    ("ago", "rate", "dead"), [(30, None, False), (899, None, False), (2000, None, True), (2000, 0.01, False)]
)
def test_a_run_without_progress_for_long_looks_dead(ago, rate, dead):
    last = datetime.fromtimestamp(time.time() - ago, UTC).isoformat(timespec="seconds")
    current = {"last_progress": last, "done": 100, "shards": [10, 20], "images_per_second": rate}
    assert ("its job may have ended" in status._ago(current)) is dead
