import json
from contextlib import nullcontext

import pytest
import typer.main
from typer.testing import CliRunner

from cluster import jobs
from glad_core.errors import GladError
from pipelines.cli.jobs import LOCATIONS, check
from pipelines.cli.main import app

ROOT = typer.main.get_command(app)


def test_a_command_for_the_cluster_gets_the_address_of_the_cluster_it_runs_on():
    words = ["score", "s3://photos", "--out", "/shared/out", "--model", "small"]
    assert check(words, ROOT) == [*words, "--address", "auto"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "/results"], "'show' cannot be submitted: give one of calibrate, doctor, retrain, score, train"),
        (["score", "photos", "--out", "s3://b/out"], "photos: the cluster does not know this folder"),
        (["train", "s3://d", "--out", "s3://b/out", "--exclude", "run"], "run: the cluster does not know this folder"),
        (["score", "/a", "--out", "/b", "--address", "auto"], "give --address before --"),
    ],
)
def test_what_cannot_run_on_a_cluster_is_not_sent(words, message):
    with pytest.raises(GladError, match=message):
        check(words, ROOT)
    outcome = CliRunner().invoke(app, ["submit", "--address", "http://127.0.0.1:1", "--", *words])
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_locations_are_parameters_of_commands_that_can_be_submitted():
    commands = [command for command in ROOT.commands.values() if any(p.name == "address" for p in command.params)]
    assert set(LOCATIONS) <= {parameter.name for command in commands for parameter in command.params}


def test_jobs_are_listed_as_a_table_or_as_json(monkeypatch):
    row = {"id": "raysubmit_x", "status": "RUNNING", "command": "score [a] b", "started": 0, "ended": None}
    monkeypatch.setattr(jobs, "job_client", lambda address: nullcontext())
    monkeypatch.setattr(jobs, "submitted_jobs", lambda client: [row])
    assert json.loads(CliRunner().invoke(app, ["jobs", "list", "--json"]).stdout) == [row]
    table = CliRunner().invoke(app, ["jobs", "list"]).stdout
    for text in ("raysubmit_x", "RUNNING", "1970-01-01 00:00", "score [a] b"):
        assert text in table


def test_a_cluster_file_with_errors_ends_with_1(monkeypatch):
    for problems, examples, code in ((["no head"], ["region"], 1), ([], ["region"], 0), ([], [], 0)):
        monkeypatch.setattr("cluster.check_file.check_cluster_file", lambda file, p=problems, e=examples: (p, e))
        outcome = CliRunner().invoke(app, ["cluster", "check", "x.yaml"])
        assert outcome.exit_code == code
        assert ("no head" in outcome.stdout, "region" in outcome.stdout) == (bool(problems), bool(examples))
        assert ("nothing wrong found" in outcome.stdout) == (not problems and not examples)
