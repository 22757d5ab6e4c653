from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.check_file import EXAMPLES, check_cluster_file
from pipelines.cli.main import app

SHIPPED = Path(__file__).parents[2] / "ray_cluster.yaml"


def test_ray_accepts_the_shipped_file_which_names_what_to_change():
    problems, unchanged = check_cluster_file(SHIPPED)
    assert problems == []
    assert len(unchanged) == len(EXAMPLES)
    config = yaml.safe_load(SHIPPED.read_text())
    types = config["available_node_types"]
    assert {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]} == {"gpu_spot"}
    assert all("IamInstanceProfile" in node["node_config"] for node in types.values())


def broken(change):
    config = yaml.safe_load(SHIPPED.read_text())
    change(config)
    return config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(idle_timeout="10"), ["idle_timeout"]),
        (lambda c: c.update(head_node_type="boss"), ["head_node_type"]),
        (lambda c: c["available_node_types"]["gpu_spot"].update(min_workers=99), ["max_workers"]),
        (lambda c: c["provider"].pop("security_group"), ["security_group", "world"]),
        (lambda c: rule(c).update(CidrIp="0.0.0.0/0"), ["0.0.0.0/0", "world"]),
        (lambda c: rule(c).update(CidrIp="my office"), ["my office", "no network"]),
        (lambda c: c.update(head_start_ray_commands=["ray start --head"]), ["RAY_AUTH_MODE=token"]),
        (lambda c: c.update(worker_start_ray_commands=[]), ["worker_start_ray_commands"]),
        (
            lambda c: c.update(head_start_ray_commands=["RAY_AUTH_MODE=token ray start --dashboard-host=0.0.0.0"]),
            ["dashboard", "0.0.0.0"],
        ),
        (lambda c: c.update(setup_commands=["export AWS_SECRET_ACCESS_KEY=x"]), ["credentials", "IamInstanceProfile"]),
    ],
)
def test_every_mistake_is_one_line_with_its_place(tmp_path, change, words):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(broken(change)))
    outcome = CliRunner().invoke(app, ["cluster", "check", str(path)])
    assert outcome.exit_code == 1, outcome.output
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("wrong")]
    for word in words:
        assert word in line


def rule(config):
    return config["provider"]["security_group"]["IpPermissions"][0]["IpRanges"][0]


def test_files_that_are_no_cluster_files(tmp_path):
    for name, text in (("torn.yaml", "a: [1"), ("list.yaml", "- 1"), ("none.yaml", None), ("picture.png", "\x89")):
        path = tmp_path / name
        if text is not None:
            path.write_text(text, encoding="latin-1")
        outcome = CliRunner().invoke(app, ["cluster", "check", str(path)])
        assert outcome.exit_code == 2
        assert outcome.stderr.count("\n") == 1
        assert name in outcome.stderr
