import json
from pathlib import Path

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


def test_demo_data_names_its_folder(tmp_path):
    outcome = CliRunner().invoke(app, ["demo-data", str(tmp_path / "data")])
    assert outcome.exit_code == 0, outcome.output
    assert list(Path(tmp_path / "data").rglob("train/good/*.png"))
    assert "demo data in" in outcome.stdout
