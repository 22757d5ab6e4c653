import json

import pytest
from packaging.requirements import Requirement
from rich.console import Console
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.cli import doctor
from pipelines.cli.main import app


def test_a_package_outside_its_range_or_missing_is_wrong_with_what_to_install():
    assert doctor.package(Requirement("numpy>=1")).state == "ok"
    old = doctor.package(Requirement("numpy>=999"))
    assert old.state == "wrong"
    assert "needs >=999" in old.found
    assert doctor.package(Requirement("no-such-thing-here>=1")).advice == "pip install 'no-such-thing-here>=1'"


def test_storage_is_written_read_and_left_as_it_was(tmp_path):
    assert doctor.storage(str(tmp_path), Storage()).state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    refused = doctor.storage(str(tmp_path / "file"), Storage())
    assert refused.state == "wrong"
    assert "a file is in the way" in refused.found


def test_the_command_ends_with_1_if_something_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "packages", lambda: [])  # those of a developer's environment are not this test's
    monkeypatch.setattr(doctor, "ray_here", lambda: doctor.Finding("Ray", "ok", "starts here"))
    (tmp_path / "file").touch()
    for storage, code in ((tmp_path, 0), (tmp_path / "file", 1)):
        outcome = CliRunner().invoke(app, ["doctor", "--storage", str(storage), "--json"])
        assert outcome.exit_code == code, outcome.output
        states = {finding["what"]: finding["state"] for finding in json.loads(outcome.stdout)["findings"]}
        assert states["storage"] == ("wrong" if code else "ok")
        assert {"device cpu", "disk", "memory", "open files"} <= set(states)


def test_packages_as_required_are_one_row_and_others_are_named(capsys):
    found = [doctor.package(Requirement(name)) for name in ("numpy>=1", "pillow>=1", "rich>=999")]
    doctor.print_table([*found, doctor.Finding("disk", "ok", "9 GB")], Console(width=120))
    shown = capsys.readouterr().out
    assert "2 as required" in shown
    assert "numpy" not in shown
    assert "pip install 'rich>=999'" in shown


@pytest.mark.parametrize(("died", "state"), [(None, "ok"), (doctor.session.SessionError("no memory"), "wrong")])
def test_ray_is_started_once(monkeypatch, died, state):
    calls = []

    def connect(address):
        calls.append(address)
        if died:
            raise died

    monkeypatch.setattr(doctor.session, "connect", connect)
    monkeypatch.setattr(doctor.session, "resources", lambda: {"CPU": 2.0})
    assert doctor.ray_here().state == state
    assert calls == [None]


@pytest.mark.slow
def test_storage_on_s3(s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    assert doctor.storage("s3://ready/doctor", Storage.from_environment()).state == "ok"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert "refused the credentials" in doctor.storage("s3://ready/doctor", Storage.from_environment()).found
