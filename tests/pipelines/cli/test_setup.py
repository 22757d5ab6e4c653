import json

from typer.testing import CliRunner

from pipelines.cli.main import app


def test_config_show_prints_a_table_and_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, ["config", "show", "drift", "one", "--out", "[plot].png"])
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in outcome.stdout.splitlines()]
    assert ["drift", "out", "[plot].png", "flag"] in rows
    assert ["drift", "second", "-", "default"] in rows
    outcome = CliRunner().invoke(app, ["config", "show", "drift", "one", "--out", "x.png", "--json"])
    values = {row["setting"]: row["value"] for row in json.loads(outcome.stdout)["settings"]}
    assert (values["out"], values["alpha"], values["json"]) == ("x.png", 0.01, False)


def test_demo_data_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.demo.boards.make_demo_data", lambda out, seed: out / f"seed-{seed}")
    outcome = CliRunner().invoke(app, ["demo-data", str(tmp_path), "--seed", "3"])
    assert "".join(outcome.stdout.split()) == f"demodatain{tmp_path}/seed-3"  # the console may wrap it
