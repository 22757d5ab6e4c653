import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.check_file import EXAMPLES, check_cluster_file
from pipelines.cli.main import app

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "ray_cluster.yaml"


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """The checkout as the current folder, and a home with a token."""
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)


def changed(text):
    """The file with values of one's own in place of the examples."""
    for example in EXAMPLES:
        text = text.replace(example, example.replace("0123456789", "9876543210").replace("example", "mine"))
    return text.replace("123456789012", "210987654321").replace("s3://your-", "s3://")


def test_ray_accepts_the_shipped_file_which_names_what_to_change():
    problems, examples, notes = check_cluster_file(SHIPPED)
    assert (problems, notes) == ([], [])
    assert [line.split()[0] for line in examples] == [example for example in EXAMPLES if example in SHIPPED.read_text()]
    config = yaml.safe_load(SHIPPED.read_text())
    types = config["available_node_types"]
    assert {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]} == {"gpu_spot"}
    assert {name for name, node in types.items() if node["resources"].get("memory") == 0} == {"head"}


@pytest.mark.parametrize(
    "name", ["ray_cluster.yaml", *(f"cluster/kuberay/{name}.yaml" for name in ("raycluster", "rayjob", "account"))]
)
def test_every_line_to_change_is_refused_until_it_is_changed(tmp_path, name):
    text = (ROOT / name).read_text()
    code = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    marked = [line for line in code if "CHANGE" in line]
    examples = [line for line in code if any(example in line for example in EXAMPLES)]
    assert set(marked) <= set(examples)
    assert examples
    unmarked = [line for line in examples if "CHANGE" not in line]
    assert all("--model s3://your-" in line for line in unmarked)  # a command of several words, marked above it
    outcome = CliRunner().invoke(app, ["cluster", "check", name])
    assert outcome.exit_code == 1
    assert len([line for line in outcome.stdout.splitlines() if line.startswith("change")]) == len(examples)
    path = tmp_path / "mine.yaml"
    path.write_text(changed(text))
    outcome = CliRunner().invoke(app, ["cluster", "check", str(path)])
    assert (outcome.exit_code, outcome.stdout) == (0, "nothing wrong found\n")


def node(config, name="gpu_spot"):
    return config["available_node_types"][name]["node_config"]


def group(config, **rule):
    config["provider"]["security_group"] = {
        "IpPermissions": [{"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp"} | rule]
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(idle_timeout="10"), ["idle_timeout"]),
        (lambda c: c.update(head_node_type="boss"), ["head_node_type"]),
        (lambda c: c["available_node_types"]["gpu_spot"].update(min_workers=99), ["max_workers"]),
        (lambda c: node(c).update(ImageId="latest_dlami"), ["gpu_spot", "ImageId", "latest_dlami", "Python 3.6"]),
        (lambda c: node(c).update(ImageId="LATEST_DLAMI"), ["gpu_spot", "ImageId", "Python 3.6"]),
        (lambda c: node(c).pop("ImageId"), ["gpu_spot", "ImageId: none", "Python 3.6"]),
        (lambda c: node(c).update(ImageId="ubuntu-24.04"), ["ImageId", "no id of an image"]),
        (lambda c: node(c).pop("SecurityGroupIds"), ["gpu_spot", "SecurityGroupIds", "world"]),
        (lambda c: node(c).pop("IamInstanceProfile"), ["gpu_spot", "IamInstanceProfile"]),
        (lambda c: group(c, IpRanges=[{"CidrIp": "0.0.0.0/0"}]), ["0.0.0.0/0", "world"]),
        (lambda c: group(c, Ipv6Ranges=[{"CidrIpv6": "::/0"}]), ["::/0", "world"]),
        (lambda c: group(c, IpRanges=[{"CidrIp": "my office"}]), ["my office", "no network"]),
        (lambda c: c.update(head_start_ray_commands=["ray start --head"]), ["RAY_AUTH_MODE=token"]),
        (lambda c: c.update(worker_start_ray_commands=[]), ["worker_start_ray_commands"]),
        (
            lambda c: c.update(head_start_ray_commands=["RAY_AUTH_MODE=token ray start --dashboard-host=0.0.0.0"]),
            ["dashboard", "0.0.0.0"],
        ),
        (lambda c: c.update(setup_commands=["export AWS_SECRET_ACCESS_KEY=x"]), ["credentials", "IamInstanceProfile"]),
        (lambda c: c.update(setup_commands=["pip install ray"]), ["setup_commands: ray", "requirements.lock"]),
        (lambda c: c["available_node_types"]["cpu"].update(worker_setup_commands=["pip install x"]), ["cpu", "x: "]),
        (lambda c: c.pop("head_setup_commands"), ["head_setup_commands: boto3>=1.4.8"]),  # Ray's own default
        (lambda c: c.pop("setup_commands"), ["setup_commands: ray[default] @ https"]),
        (lambda c: c.update(docker={"image": "rayproject/ray", "container_name": "r"}), ["docker.image", "version"]),
        (lambda c: c["file_mounts"].update({"/home/ubuntu/glad/requirements.lock": "none.lock"}), ["none.lock"]),
        (lambda c: c["file_mounts"].pop("/home/ubuntu/glad/requirements.lock"), ["cannot be checked", "file_mounts"]),
    ],
)
def test_every_mistake_has_a_line_with_its_place(tmp_path, change, words):
    config = yaml.safe_load(changed(SHIPPED.read_text()))
    change(config)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    outcome = CliRunner().invoke(app, ["cluster", "check", str(path)])
    assert outcome.exit_code == 1, outcome.output
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("wrong")]
    assert any(all(word in line for word in words) for line in lines), outcome.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(max_workers=8), "but 8 GPUs may come"),
        (lambda c: node(c).update(InstanceType="g5.12xlarge"), "but 34 GPUs may come"),
        (lambda c: c["available_node_types"]["gpu_spot"].update(resources={"GPU": 4}), "but 34 GPUs may come"),
        (lambda c: node(c).update(InstanceType="g9.xlarge"), "see that it is the GPUs of all g9.xlarge"),
        (lambda c: c["available_node_types"]["head"]["resources"].pop("gpus_to_come"), "is 0, but 10"),
    ],
)
def test_gpus_to_come_that_do_not_come_are_noted(tmp_path, change, words):
    config = yaml.safe_load(changed(SHIPPED.read_text()))
    change(config)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    outcome = CliRunner().invoke(app, ["cluster", "check", str(path)])
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("note")]
    assert words in line
    assert outcome.exit_code == 0


def test_files_that_are_no_cluster_files(tmp_path):
    for name, text in (("torn.yaml", "a: [1"), ("list.yaml", "- 1"), ("none.yaml", None), ("picture.png", "\x89")):
        path = tmp_path / name
        if text is not None:
            path.write_text(text, encoding="latin-1")
        outcome = CliRunner().invoke(app, ["cluster", "check", str(path)])
        assert outcome.exit_code == 2
        assert outcome.stderr.count("\n") == 1
        assert name in outcome.stderr


def test_boto3_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    (problem,) = [line for line in check_cluster_file(SHIPPED).problems if "boto3" in line]
    assert "pip install 'glad-ray[aws]'" in problem


def test_a_token_that_was_never_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "home/.ray/auth_token").unlink()
    (problem,) = check_cluster_file(SHIPPED).problems
    assert "auth_token" in problem
    assert "ray get-auth-token --generate" in problem
