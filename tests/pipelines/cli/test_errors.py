import socket
import time

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(outcome, *words):
    """Exit code 2 and exactly one line on stderr, which holds the words."""
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


def test_options_and_commands_that_do_not_fit_are_one_line(tmp_path):
    assert_refused(run("scor"), "Did you mean 'score'")
    assert_refused(run("--cofnig", "x"), "--config")
    assert_refused(run("score"), "Missing argument 'source'", "score --help")
    assert_refused(run("score", "x", "--out"), "'--out' requires an argument")
    assert_refused(run("score", "x", "--out", "y"), "Missing option '--model'", "`glad train`", "drawn circuit boards")
    assert_refused(run("score", "x", "--out", "y", "--batchsize", 3), "--batch-size")
    assert_refused(run("score", "x", "--out", "y", "--batch-size", "many"), "--batch-size", "integer")
    assert_refused(run("score", "x", "--out", "y", "--maps", "huge"), "'huge' is not one of 'token', 'full'")
    assert_refused(run("score", "a.png", "b.png", "--out", "y", "--model", "m"), "expanded a pattern such as *.png")
    assert_refused(run("submit", "score", "x", "--out", "y"), "after --, as in `glad submit -- score ...`")
    assert_refused(run("jobs", "lst"), "Did you mean 'list'")
    assert_refused(run("demo", "--out", "/proc/glad"), "/proc/glad", "can be written")
    assert_refused(run("bundle", "create", "nowhere", "--out", tmp_path / "x"), "no such folder", "OWNER/MODEL")
    assert "Commands" in run().output


def test_a_cluster_that_does_not_answer_is_reported_at_once(tmp_path, tiny_bundle, photos, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        outcome = run("score", photos, "--model", tiny_bundle, "--out", tmp_path / "out", "--address", address)
        assert_refused(outcome, address)
        assert time.monotonic() - started < 20  # Ray itself tries for over ten minutes


@pytest.fixture
def no_ray(monkeypatch):
    """Fails a test that starts Ray: these mistakes have to be found before."""
    monkeypatch.setattr("cluster.session.connect", lambda address: pytest.fail("Ray was started"))


@pytest.mark.usefixtures("no_ray")
def test_mistakes_found_before_anything_starts(tmp_path, tiny_bundle, photos):
    out = tmp_path / "out"
    model = ("--model", tiny_bundle)
    assert_refused(run("score", tmp_path / "none", *model, "--out", out), "no such file or folder")
    assert_refused(run("score", photos, "--model", tmp_path / "none", "--out", out), "no such model bundle")
    assert_refused(run("score", photos, "--model", photos, "--out", out), "not a GLAD bundle")
    assert_refused(run("score", photos, *model, "--out", photos / "out"), "lies inside the archive")
    assert_refused(run("score", photos, *model, "--out", "gs://bucket/out"), "unknown kind of location")
    assert_refused(run("score", photos, *model, "--out", "/proc/glad"), "/proc/glad", "cannot be written")
    assert_refused(run("show", tmp_path), "no finished run")
    assert not out.exists()
    (out / "results").mkdir(parents=True)
    assert_refused(run("score", photos, *model, "--out", out), "already holds", "--overwrite")


@pytest.mark.usefixtures("no_ray")
def test_an_endpoint_that_cannot_be_reached(monkeypatch, tmp_path, tiny_bundle):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    outcome = run("score", "s3://bucket/x", "--model", tiny_bundle, "--out", tmp_path / "out")
    assert_refused(outcome, "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_ray")
def test_a_message_with_brackets_is_printed_as_it_is(tmp_path, photos):
    outcome = run("score", photos, "--model", tmp_path / "[bold]x", "--out", tmp_path / "out")
    assert_refused(outcome, "[bold]x")
