import json
from dataclasses import replace

from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.runs import commits
from pipelines.runs.run import Run
from pipelines.runs.write import complete


def glad(*arguments):
    return CliRunner().invoke(app, ["status", *map(str, arguments)])


def test_a_run_from_its_claim_to_its_end(tmp_path):
    out = str(tmp_path / "out")
    nothing = glad(out)
    assert nothing.exit_code == 2
    assert "no run was started there" in nothing.stderr

    run = Run.at(out)
    commits.claim(run, {"source": "/photos", "models": {"": "abc"}}, overwrite=False)
    assert json.loads(glad(out, "--json").stdout) | {"asked": 0} == {
        "state": "listing",
        "images": None,
        "done": 0,
        "anomalies": 0,
        "errors": 0,
        "shards": [0, None],
        "asked": 0,
    }
    plan = commits.make_plan(run, [20], 0, 512)
    half = commits.Written(0, 3, 1, 1, ("results/a",))
    list(commits.commit_shards(run, plan, [half, replace(half, scored=4, errors=0)]))
    found = json.loads(glad(out, "--json").stdout)
    assert (found["state"], found["done"], found["anomalies"], found["errors"]) == ("unfinished", 8, 2, 1)
    assert found["shards"] == [1, 3]
    assert "8 of 20 (40.0%)" in glad(out).stdout
    complete(run, {"counts": {"scored": 0, "errors": 0}})
    assert "complete" in glad(out).stdout
