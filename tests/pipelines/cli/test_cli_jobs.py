import json
from contextlib import nullcontext

import pytest
import typer.main
from typer.testing import CliRunner

from cluster import jobs
from cluster.check_file import Findings
from glad_core.errors import GladError
from pipelines.cli.jobs import LOCATIONS, READERS, check
from pipelines.cli.main import app

ROOT = typer.main.get_command(app)
CONTEXT = ROOT.make_context("glad", ["doctor"])


def test_a_command_for_the_cluster_gets_the_address_of_the_cluster_it_runs_on():
    words = ["score", "s3://photos", "--out", "/shared/out", "--model", "small"]
    assert check(words, CONTEXT) == [*words, "--address", "auto"]
    words = ["show", "s3://verdicts/monday", "--out", "s3://verdicts/monday.png"]
    assert check(words, CONTEXT) == words  # it needs no Ray


def test_options_of_this_machine_s_file_and_environment_are_sent_along(monkeypatch):
    monkeypatch.setenv("GLAD_SCORE_BATCH_SIZE", "4")
    monkeypatch.setenv("GLAD_SCORE_COMPILED", "true")
    monkeypatch.setenv("GLAD_SCORE_ADDRESS", "10.0.0.1:6379")  # of another way to use a cluster
    context = ROOT.make_context("glad", ["doctor"])
    context.default_map = {"score": {"out": "s3://b/o u t", "seed": 3, "reconstructions": True}, "train": {"seed": 1}}
    given = ["score", "s3://photos", "--seed", "5", "--model", "small"]
    words = check(given, context)
    assert words[:6] == given
    assert set(words[6:-2]) == {"--out=s3://b/o u t", "--batch-size=4", "--reconstructions", "--compile"}
    assert words[-2:] == ["--address", "auto"]
    context.default_map = {"score": {"out": "folder"}}
    with pytest.raises(GladError, match="folder: the cluster does not know this folder"):
        check(given, context)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "s3://a/one.png", "--model", "small"], "give --out: a submitted job writes its results there"),
        (["view", "/results"], "'view' cannot be submitted: give one of ablate, calibrate, doctor, drift, evaluate, "),
        (["report", "s3://b/run"], "report.html: the cluster does not know this folder"),
        (["show", "run", "--out", "s3://b/x"], "run: the cluster does not know this folder"),
        (["evaluate", "s3://b/run", "--dataset", "data"], "data: the cluster does not know this folder"),
        (["drift", "s3://b/run", "other"], "other: the cluster does not know this folder"),
        (["ablate", "s3://d", "--model", "/m", "--plain", "p", "--out", "s3://b/o"], "p: the cluster does not know"),
        (["calibrate", "s3://d", "--model", "small", "--out", "s3:/b/o"], "s3:/b/o: the cluster does not know"),
        (["score", "photos", "--model", "small", "--out", "s3://b/o"], "photos: the cluster does not know"),
        (["train", "s3://d", "--out", "s3://b/out", "--exclude", "run"], "run: the cluster does not know this folder"),
        (["score", "/a", "--model", "small", "--out", "/b", "--address", "auto"], "give --address before --"),
    ],
)
def test_what_cannot_run_on_a_cluster_is_not_sent(words, message):
    with pytest.raises(GladError, match=message):
        check(words, CONTEXT)
    outcome = CliRunner().invoke(app, ["submit", "--address", "http://127.0.0.1:1", "--", *words])
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_locations_are_parameters_of_commands_that_can_be_submitted():
    commands = [
        command
        for name, command in ROOT.commands.items()
        if name in READERS or any(p.name == "address" for p in command.params)
    ]
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
    for problems, examples, code in ((["no head"], ["region"], 1), ([], ["region"], 1), ([], [], 0)):
        findings = Findings(problems, examples, [])
        monkeypatch.setattr("cluster.check_file.check_cluster_file", lambda file, findings=findings: findings)
        outcome = CliRunner().invoke(app, ["cluster", "check", "x.yaml"])
        assert outcome.exit_code == code
        assert ("no head" in outcome.stdout, "region" in outcome.stdout) == (bool(problems), bool(examples))
        assert ("nothing wrong found" in outcome.stdout) == (not problems and not examples)
