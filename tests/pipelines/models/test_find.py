import shutil
from pathlib import Path

import pytest
from conftest import make_bucket

from cluster.storage import Storage, StorageError
from glad_core.bundle.glad_json import update_settings, verify
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.models import registry
from pipelines.models.find import SMALL_BUNDLE, describe, find_models, local_bundle

STORAGE = Storage()


def test_a_single_bundle_judges_every_image(tiny_bundle):
    for location in (str(tiny_bundle), f"{tiny_bundle}/", f"file://{tiny_bundle}"):
        models = find_models(location, STORAGE)
        assert models.bundles == {"": str(tiny_bundle)}
        assert models.categories == ()
        assert models.key("whatever") == models.key(None) == ""


def test_a_registry_gives_each_category_its_current_bundle(tiny_bundle, tmp_path):
    home = str(tmp_path / "registry")
    version = registry.publish(tiny_bundle, home, "bolt", STORAGE)
    registry.publish(tiny_bundle, home, "washer", STORAGE)
    with pytest.raises(GladError):
        find_models(home, STORAGE)  # nothing promoted yet
    registry.promote(home, "bolt", version, STORAGE, "test")
    models = find_models(f"{home}/", STORAGE)
    assert models.bundles == {"bolt": f"{home}/bolt/{version}"}
    assert models.categories == ("bolt",)
    assert models.line(home) == f"models of 1 category in {home}: bolt"
    assert models.key("bolt") == "bolt"
    assert models.key("nut") is models.key(None) is None
    assert models.settings()["bolt"].threshold == 3.6


def test_small_is_the_embedded_bundle_unless_a_bundle_has_that_name(tmp_path, tiny_bundle, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()  # of pictures, perhaps
    assert local_bundle("small", STORAGE) == SMALL_BUNDLE
    models = find_models("small", STORAGE)
    assert models.bundles == {"": "small"}
    assert "for circuit_board: the demo's, trained on drawn circuit boards; for other" in models.line("small")
    (tmp_path / "small").rmdir()
    shutil.copytree(tiny_bundle, tmp_path / "small")
    assert local_bundle("small", STORAGE) == tmp_path / "small"
    own = find_models("small", STORAGE)
    assert own.line("small") == f"model small ({own.descriptions[''].model_id}) for widget"


@pytest.mark.slow
def test_a_bundle_on_s3_is_copied_once_and_anew_when_it_changes(tiny_bundle, tmp_path, s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLAD_CACHE", str(tmp_path / "cache"))
    make_bucket(s3_server, "find")
    storage, location = Storage.from_environment(), "s3://find/bundle"
    with pytest.raises(GladError, match="no model bundle there"):
        local_bundle(location, storage)
    storage.publish(tiny_bundle, location, "glad.json")
    assert find_models(location, storage).bundles == {"": location}
    assert describe(f"{location}/", storage) == verify(tiny_bundle)
    assert not (tmp_path / "cache").exists()  # for a description nobody copies weights
    folder = local_bundle(location, storage)
    assert verify(folder) == verify(tiny_bundle)
    assert folder.parent == tmp_path / "cache" / "bundles"
    before = (folder / "glad.json").stat().st_mtime_ns
    assert local_bundle(f"{location}/", storage) == folder
    assert (folder / "glad.json").stat().st_mtime_ns == before

    changed = local_copy(folder, tmp_path / "changed")
    update_settings(changed, Settings.parse({"threshold": 9.0}, "test"), {})
    storage.delete_folder(location)
    storage.publish(changed, location, "glad.json")
    assert verify(local_bundle(location, storage)).settings["threshold"] == 9.0
    assert len([path for path in folder.parent.iterdir() if path.is_dir()]) == 2  # and nothing half-copied


@pytest.mark.parametrize("key", ["/evil", "unet//config.json", "a/../../evil", "a\\b", "a\nb", "unet/evil.bin"])
def test_a_key_that_is_not_the_bundles_is_told_before_anything_is_copied(key, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("GLAD_CACHE", str(tmp_path / "cache"))
    keys = [*STORAGE.walk(str(tiny_bundle)), (key, 1)]
    monkeypatch.setattr(Storage, "walk", lambda self, uri: iter(keys))
    monkeypatch.setattr(Storage, "read", lambda self, uri, most: (tiny_bundle / "glad.json").read_bytes())
    monkeypatch.setattr(Storage, "fetch", lambda self, uri, target: pytest.fail("copied"))
    for use in (local_bundle, describe):
        with pytest.raises(GladError, match=r"not listed in glad\.json") as caught:
            use("s3://bucket/bundle", STORAGE)
        assert str(caught.value).isprintable()


def local_copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_an_unreachable_s3_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GLAD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StorageError, match=r"cannot reach http://127.0.0.1:9"):
        local_bundle("s3://bucket/bundle", Storage("http://127.0.0.1:9", "id", "secret", region="us-east-1"))
    assert not (tmp_path / "cache").exists()
