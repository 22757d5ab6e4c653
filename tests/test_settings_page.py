"""docs/settings.md is up to date with the code, and its hand-written part is true."""

import json
import re
import runpy
from pathlib import Path

import yaml
from typer.testing import CliRunner

from pipelines.cli.main import app

ROOT = Path(__file__).parents[1]
MAKER = runpy.run_path(str(ROOT / "docs/settings.py"))


def test_the_page_is_up_to_date():
    assert (ROOT / "docs/settings.md").read_text() == MAKER["page"](), "run `make docs`"


def test_its_glad_yaml_and_its_variables_set_options(tmp_path, monkeypatch):
    example = re.search(r"```yaml\n(.*?)```", MAKER["HEAD"], re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("glad.yaml").write_text(example)
    variables = dict(re.findall(r"`(GLAD_\w+)=([^`]+)`", MAKER["HEAD"]))
    outcome = CliRunner().invoke(app, ["config", "show", "--json"], env=variables)
    rows = json.loads(outcome.stdout)["settings"]
    values = {(row["command"], row["setting"]): (row["value"], row["from"]) for row in rows}
    assert values["score", "out"] == (yaml.safe_load(example)["score"]["out"], "file")
    assert values["score", "reconstructions"] == (True, "file")
    assert values["score", "batch-size"] == (16, "environment")
    assert values["bundle create", "preset"] == ("VisA/pcb1", "environment")


def test_the_code_reads_every_other_variable_it_names():
    code = "".join(path.read_text() for room in ("cluster", "pipelines") for path in (ROOT / room).rglob("*.py"))
    table = "".join(line for line in MAKER["HEAD"].splitlines() if line.startswith("|"))
    names = re.findall(r"`([A-Z0-9_]+)`", table)
    assert len(names) > 10
    assert [name for name in names if name not in code] == []
