import json
import shutil

from typer.testing import CliRunner

from pipelines.cli.main import app


def glad(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_json_of_a_bundle_is_its_description(tiny_bundle):
    outcome = glad("bundle", "inspect", tiny_bundle, "--json")
    description, features = (
        json.loads((tiny_bundle / name).read_text()) for name in ("glad.json", "features/config.json")
    )
    assert json.loads(outcome.stdout) == description | {"features": features}


def test_json_of_a_registry(tiny_bundle, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(tiny_bundle, models / "bolt/v1")
    (row,) = json.loads(glad("registry", "list", models, "--json").stdout)["categories"]
    assert row == {"category": "bolt", "current": None, "since": None, "reason": None, "versions": ["v1"]}
    assert glad("registry", "promote", models, "bolt", "v1").exit_code == 0
    (row,) = json.loads(glad("registry", "list", models, "--json").stdout)["categories"]
    assert (row["current"], row["reason"]) == ("v1", "by hand")
    (row,) = json.loads(glad("registry", "show", models, "bolt", "--json").stdout)["versions"]
    assert (row["version"], row["state"], row["good_images"]) == ("v1", "current", None)
    assert row["delta"] == json.loads((tiny_bundle / "glad.json").read_text())["settings"]["delta"]
    wrong = glad("registry", "show", models, "bolts")
    assert wrong.exit_code == 2
    assert "did you mean 'bolt'" in wrong.stderr


def test_rollback_makes_the_earlier_version_current(tiny_bundle, tmp_path):
    for version in ("v1", "v2"):
        shutil.copytree(tiny_bundle, tmp_path / "bolt" / version)
        assert glad("registry", "promote", tmp_path, "bolt", version).stdout == f"bolt: {version} is current\n"
    assert glad("registry", "rollback", tmp_path, "bolt").stdout == "bolt: v1 is current again\n"
