from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.score import job
from pipelines.score.request import ScoreRequest, TooManyErrors


def score(monkeypatch, *options):
    """The request that `glad score` makes of the options."""
    requests = []
    monkeypatch.setattr(job, "score", lambda request, console: requests.append(request))
    monkeypatch.setattr(job, "print_end", lambda *_: None)
    outcome = CliRunner().invoke(app, ["score", "photos", "--out", "results", "--model", "bundle", *options])
    assert outcome.exit_code == 0, outcome.output
    return requests[0]


def test_without_options_the_request_has_its_own_defaults(monkeypatch):
    assert score(monkeypatch) == ScoreRequest("photos", "results", "bundle")


def test_every_option_reaches_the_request(monkeypatch):
    flags = ["--reconstructions", "--overwrite", "--compile", "--new"]
    options = {
        "model": "other",
        "category": "screw",
        "batch-size": 3,
        "actors": 2,
        "num-cpus": 0.5,
        "num-gpus": 0.25,
        "seed": 7,
        "max-errors": 9,
        "maps": "full",
        "address": "auto",
        "method": "nearest",
        "good": "good",
        "search": "guarded",
        "precision": "bf16",
        "pages": "first",
        "notify": "https://example.com/hook",
    }
    request = score(
        monkeypatch, *flags, *(word for name, value in options.items() for word in (f"--{name}", str(value)))
    )
    values = {name.replace("-", "_"): value for name, value in options.items()}
    values |= {"reconstructions": True, "overwrite": True, "compiled": True, "new": True}
    assert request == ScoreRequest("photos", "results", **values)


def test_too_many_errors_stop_with_exit_code_1_and_one_line(monkeypatch):
    def stop(request, console):
        raise TooManyErrors("stopped after\n3 errors")

    monkeypatch.setattr(job, "score", stop)
    outcome = CliRunner().invoke(app, ["score", "photos", "--out", "results", "--model", "small", "--max-errors", "2"])
    assert (outcome.exit_code, outcome.stderr) == (1, "Error: stopped after 3 errors\n")
