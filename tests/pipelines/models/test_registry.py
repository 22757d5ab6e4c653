import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description, update_settings, verify
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.cli.main import app
from pipelines.models import registry
from pipelines.models.find import find_models

STORAGE = Storage()


def version_of(base: Path, folder: Path, threshold: float) -> Path:
    shutil.copytree(base, folder)
    settings = Settings.parse(read_description(folder).settings, "test")
    update_settings(folder, settings.model_copy(update={"threshold": threshold}), {"good_images": 7})
    return folder


@pytest.fixture
def home(tmp_path, tiny_bundle) -> tuple[str, list[str]]:
    home = str(tmp_path / "registry")
    made = [version_of(tiny_bundle, tmp_path / f"made{n}", float(n + 1)) for n in range(3)]
    return home, [registry.publish(folder, home, "bolt", STORAGE) for folder in made]


def test_versions_are_content_addressed_and_stay_as_they_are(home, tmp_path):
    place, versions = home
    assert registry.versions(place, "bolt", STORAGE) == sorted(versions)
    assert all(verify(f"{place}/bolt/{version}").model_id == version for version in versions)
    stored = Path(place, "bolt", versions[0], "glad.json")
    before = stored.stat().st_mtime_ns
    assert registry.publish(tmp_path / "made0", place, "bolt", STORAGE) == versions[0]
    assert stored.stat().st_mtime_ns == before


def test_promotion_and_rollback_walk_through_the_versions(home):
    place, (first, second, third) = home
    assert registry.current(place, "bolt", STORAGE) is None
    for version in (first, second, third):
        registry.promote(place, "bolt", version, STORAGE, "test")
    assert registry.current(place, "bolt", STORAGE).earlier == [second, first]
    assert registry.rollback(place, "bolt", STORAGE).version == second
    registry.promote(place, "bolt", first, STORAGE, "test")
    assert registry.current(place, "bolt", STORAGE).earlier == [second]
    assert registry.rollback(place, "bolt", STORAGE).version == second
    with pytest.raises(GladError, match="no earlier version"):
        registry.rollback(place, "bolt", STORAGE)


def test_a_registry_is_found_as_models_of_its_categories(home, tmp_path, tiny_bundle):
    place, (first, _, _) = home
    with pytest.raises(GladError):
        find_models(place, STORAGE)  # nothing promoted yet
    registry.promote(place, "bolt", first, STORAGE, "test")
    models = find_models(place, STORAGE)
    assert models.categories == ("bolt",)
    assert models.key("bolt") == "bolt"
    assert models.key("nut") is models.key(None) is None
    assert models.settings()["bolt"].threshold == 1.0
    single = find_models(str(tiny_bundle), STORAGE)
    assert single.categories == ()
    assert single.key("whatever") == single.key(None) == ""


def test_an_unfinished_upload_is_no_version(home):
    place, (first, *_) = home
    Path(place, "bolt", first, "glad.json").unlink()
    assert first not in registry.versions(place, "bolt", STORAGE)
    with pytest.raises(GladError, match="no version"):
        registry.promote(place, "bolt", first, STORAGE, "test")


def test_a_version_that_fails_its_checksum_is_refused_in_one_line(home, tmp_path):
    place, (first, *_) = home
    registry.promote(place, "bolt", first, STORAGE, "test")
    weights = Path(place, "bolt", first, "unet/diffusion_pytorch_model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(GladError, match="does not match its sha256"):
        load_bundle(find_models(place, STORAGE).bundles["bolt"])


def run(*arguments):
    return CliRunner().invoke(app, ["registry", *map(str, arguments)])


def test_the_commands(home, tmp_path):
    place, (first, second, _) = home
    assert run("promote", place, "bolt", first).exit_code == 0
    assert run("promote", place, "bolt", second).exit_code == 0
    listed = run("list", place)
    assert listed.exit_code == 0
    assert second in listed.stdout
    shown = run("show", place, "bolt")
    assert first in shown.stdout
    assert "current" in shown.stdout
    assert run("rollback", place, "bolt").exit_code == 0
    assert json.loads(Path(place, "bolt/current.json").read_text())["version"] == first
    for arguments, words in (
        (("promote", place, "bolt", "nonsense"), "no version 'nonsense'"),
        (("rollback", place, "bolt"), "no earlier version"),
        (("list", tmp_path / "nowhere"), "no model registry"),
        (("show", place, "nut"), "no category 'nut'"),
    ):
        outcome = run(*arguments)
        assert outcome.exit_code == 2, arguments
        assert words in outcome.stderr
        assert outcome.stderr.count("\n") == 1
    Path(place, "bolt/current.json").write_text("{")
    assert "damaged" in run("list", place).stderr
