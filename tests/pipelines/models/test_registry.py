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
    bundles = [version_of(tiny_bundle, tmp_path / f"made{n}", float(n + 1)) for n in range(3)]
    return home, [registry.publish(bundle, home, "bolt", STORAGE) for bundle in bundles]


def test_versions_are_content_addressed_and_stay_as_they_are(home, tmp_path):
    location, versions = home
    assert registry.versions(location, "bolt", STORAGE) == sorted(versions)
    assert all(verify(f"{location}/bolt/{version}").model_id == version for version in versions)
    stored = Path(location, "bolt", versions[0], "glad.json")
    before = stored.stat().st_mtime_ns
    assert registry.publish(tmp_path / "made0", location, "bolt", STORAGE) == versions[0]
    assert stored.stat().st_mtime_ns == before


def test_promotion_and_rollback_walk_through_the_versions(home):
    location, (first, second, third) = home
    assert registry.current(location, "bolt", STORAGE) is None
    for version in (first, second, third):
        registry.promote(location, "bolt", version, STORAGE, "test")
    assert registry.current(location, "bolt", STORAGE).earlier == [second, first]
    assert registry.rollback(location, "bolt", STORAGE).version == second
    registry.promote(location, "bolt", first, STORAGE, "test")
    assert registry.current(location, "bolt", STORAGE).earlier == [second]
    assert registry.rollback(location, "bolt", STORAGE).version == second
    with pytest.raises(GladError, match="no earlier version"):
        registry.rollback(location, "bolt", STORAGE)


def test_an_unfinished_upload_is_no_version(home):
    location, (first, *_) = home
    Path(location, "bolt", first, "glad.json").unlink()
    assert first not in registry.versions(location, "bolt", STORAGE)
    with pytest.raises(GladError, match="no version"):
        registry.promote(location, "bolt", first, STORAGE, "test")


def test_a_version_that_fails_its_checksum_is_refused_in_one_line(home, tmp_path):
    location, (first, *_) = home
    registry.promote(location, "bolt", first, STORAGE, "test")
    weights = Path(location, "bolt", first, "unet/diffusion_pytorch_model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(GladError, match="does not match its sha256"):
        load_bundle(find_models(location, STORAGE).bundles["bolt"])


OUTSIDE = ("../washer/0123456789abcdef", "..", "/etc", "//evil/x", "a/b", "a\\b", "a\0b", "a\nb", "", ".hidden")


@pytest.mark.parametrize("version", OUTSIDE)
def test_a_current_version_leads_nowhere_else(home, version):
    location, (first, *_) = home
    registry.promote(location, "bolt", first, STORAGE, "test")
    file = Path(location, "bolt/current.json")
    written = json.loads(file.read_text())
    for changed in ({"version": version}, {"earlier": [version]}):
        file.write_text(json.dumps(written | changed))
        for use in (find_models, registry.current_bundles):
            with pytest.raises(GladError, match=r"current\.json: damaged"):
                use(location, STORAGE)
        with pytest.raises(GladError, match="damaged"):
            registry.rollback(location, "bolt", STORAGE)


@pytest.mark.parametrize("content", ["", "[]", "7", "{}", '{"version": 7}', "\xff", '{"a":' * 100_000])
def test_a_damaged_current_version_is_one_line(home, content):
    location, (first, *_) = home
    registry.promote(location, "bolt", first, STORAGE, "test")
    Path(location, "bolt/current.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(GladError, match="damaged"):
        find_models(location, STORAGE)


@pytest.mark.parametrize("category", OUTSIDE)
def test_a_category_leads_nowhere_else(home, category):
    location, (first, *_) = home
    for use in (registry.versions, registry.current):
        with pytest.raises(GladError, match="cannot name a category"):
            use(location, category, STORAGE)
    with pytest.raises(GladError, match="cannot name a category"):
        registry.promote(location, category, first, STORAGE, "test")


def test_a_folder_of_an_odd_name_is_told(home):
    location, (first, *_) = home
    registry.promote(location, "bolt", first, STORAGE, "test")
    Path(location, "a\nb").mkdir()
    with pytest.raises(GladError, match=r"'a\\nb' cannot name a category"):
        find_models(location, STORAGE)


def test_links_may_point_within_a_registry_only(home, tmp_path):
    location, (first, second, _) = home
    Path(location, "bolt/latest").symlink_to(first)
    registry.promote(location, "bolt", "latest", STORAGE, "test")
    assert load_bundle(find_models(location, STORAGE).bundles["bolt"]).model_id == first
    shutil.move(Path(location, "bolt", second), tmp_path / "outside")
    Path(location, "bolt", second).symlink_to(tmp_path / "outside")
    with pytest.raises(GladError, match="a link that leads out of the registry"):
        registry.promote(location, "bolt", second, STORAGE, "test")
    shutil.move(Path(location, "bolt"), tmp_path / "bolt")
    Path(location, "bolt").symlink_to(tmp_path / "bolt")
    with pytest.raises(GladError, match="a link that leads out of the registry"):
        find_models(location, STORAGE)


def run(*arguments):
    return CliRunner().invoke(app, ["registry", *map(str, arguments)])


def test_the_commands(home, tmp_path):
    location, versions = home
    first, second, _ = versions
    assert run("promote", location, "bolt", first).exit_code == 0
    assert run("promote", location, "bolt", second).exit_code == 0
    listed = run("list", location)
    assert listed.exit_code == 0
    assert second in listed.stdout
    shown = run("show", location, "bolt")
    assert first in shown.stdout
    assert "current" in shown.stdout
    rows = {row.pop("version"): row for row in registry.version_rows(f"{location}/", "bolt")}
    assert [rows[version]["state"] for version in versions] == ["earlier", "current", None]
    assert rows[second] == {"state": "current", "good_images": 7, "threshold": 2.0, "start_step": 500, "delta": 0.0042}
    (row,) = registry.category_rows(f"{location}/")
    assert (row["category"], row["current"], row["reason"]) == ("bolt", second, "by hand")
    assert row["versions"] == sorted(versions)
    assert run("rollback", location, "bolt").exit_code == 0
    assert json.loads(Path(location, "bolt/current.json").read_text())["version"] == first
    for arguments, words in (
        (("promote", location, "bolt", "nonsense"), "no version 'nonsense'"),
        (("rollback", location, "bolt"), "no earlier version"),
        (("list", tmp_path / "nowhere"), "no model registry"),
        (("show", location, "nut"), "no category 'nut'"),
    ):
        outcome = run(*arguments)
        assert outcome.exit_code == 2, arguments
        assert words in outcome.stderr
        assert outcome.stderr.count("\n") == 1
    Path(location, "bolt/current.json").write_text("{")
    assert "damaged" in run("list", location).stderr
