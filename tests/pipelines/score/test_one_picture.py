"""`glad score PICTURE` prints a verdict, with the options that mean something for one picture and no others."""

import shutil

import pytest
from typer.testing import CliRunner

import glad_core
from cluster import session
from glad_core.bundle.glad_json import read_description, update_settings
from glad_core.bundle.settings import Settings
from pipelines.cli.main import app


@pytest.fixture
def folder(tmp_path, photos, tiny_bundle, monkeypatch):
    monkeypatch.setattr(session, "connect", lambda *_, **__: pytest.fail("Ray is not needed"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "one.PNG")
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "list.txt").write_text("one.PNG\n")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def score(source, bundle, *options):
    return CliRunner().invoke(app, ["score", str(source), "--model", str(bundle), *options])


def test_the_verdict_is_the_detector_s_and_nothing_is_written(folder, tiny_bundle):
    before = sorted(folder.rglob("*"))
    outcome = score("one.PNG", tiny_bundle, "--seed", "3")
    verdict = glad_core.Detector.from_pretrained(tiny_bundle, seed=3)("one.PNG")
    assert outcome.exit_code == 0, outcome.output
    assert verdict.is_anomalous is not None
    shown = outcome.stdout.splitlines()
    assert shown[0].startswith(f"model {tiny_bundle}")
    assert shown[1] == f"one.PNG: {'anomalous' if verdict.is_anomalous else 'good'}"
    assert shown[2:4] == [f"score      {verdict.score:.4g}", f"threshold  {verdict.threshold:.4g}"]
    assert shown[4].startswith(f"stop step  {verdict.stop_step}, ")
    assert sorted(folder.rglob("*")) == before


def test_a_bundle_that_keeps_its_good_scores_gives_a_p_value(folder, tiny_bundle):
    own = shutil.copytree(tiny_bundle, folder / "own")
    settings = Settings.parse(read_description(own).settings, "")
    update_settings(own, settings, {"good_scores": {"": [-1.0] * 30 + [1e6] * 9}})
    assert "p-value    0.25" in score("one.PNG", own).stdout.splitlines()


@pytest.mark.parametrize("source", [".", "list.txt", "*.png", "folder.png", "photos.tar"])
def test_any_other_archive_needs_out(folder, tiny_bundle, source):
    outcome = score(source, tiny_bundle)
    assert outcome.exit_code == 2
    assert outcome.stderr == (
        "Error: Missing option '--out': Folder for the results, local or s3://; `root score --help` lists what fits\n"
    )


@pytest.mark.parametrize(("source", "options", "message"), [
    ("missing.png", (), "missing.png: "),
    ("bad.png", (), "bad.png: not PNG, JPEG"),
    ("empty.png", (), "empty.png: the file has no bytes"),
    ("one.PNG", ("--maps", "full"), "--maps needs --out"),
    ("one.PNG", ("--compile",), "--compile needs --out"),
    ("one.PNG", ("--method", "nearest", "--good", "."), "--method needs --out"),
])  # fmt: skip
def test_a_mistake_is_one_line(folder, tiny_bundle, source, options, message):
    outcome = score(source, tiny_bundle, *options)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
