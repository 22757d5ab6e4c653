import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.storage import StorageError
from glad_core.bundle.glad_json import read_description, update_settings, verify
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.models import cache
from pipelines.models.cache import cached


@pytest.fixture
def bundles(tmp_path, monkeypatch):
    """The folder of the copies, and a process that uses nothing yet."""
    monkeypatch.setenv("GLAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_used", type(cache._used)())
    return tmp_path / "cache" / "bundles"


def disk_storage(source: Path):
    """What `cached` needs of a storage, from a folder."""
    return SimpleNamespace(fetch=lambda uri, target: shutil.copyfile(source / uri.split("bundle/")[1], target))


def copy_of(source: Path, location="s3://b"):
    text = (source / "glad.json").read_bytes()
    return cached(f"{location}/bundle", text, lambda: read_description(source), disk_storage(source))


def folders(bundles: Path) -> set[Path]:
    return {path for path in bundles.iterdir() if path.is_dir()}


def others_use_nothing():
    """As if this process had ended."""
    while cache._used:
        os.close(cache._used.popitem()[1])


def test_what_nobody_uses_goes_the_least_recently_used_first(tiny_bundle, bundles, monkeypatch):
    size = sum(path.stat().st_size for path in tiny_bundle.rglob("*") if path.is_file())
    monkeypatch.setenv("GLAD_CACHE_GB", str(3.5 * size / 1e9))
    copies = [copy_of(tiny_bundle, f"s3://{number}") for number in range(3)]
    assert folders(bundles) == set(copies)
    others_use_nothing()
    for age, copy in enumerate(copies):
        os.utime(copy.with_suffix(".lock"), (1000 - age, 1000 - age))  # the last one is the oldest
    copy_of(tiny_bundle, "s3://0")  # used once more
    others_use_nothing()
    with copies[2].with_suffix(".lock").open() as lock:  # by a living process
        fcntl.flock(lock, fcntl.LOCK_SH)
        fourth = copy_of(tiny_bundle, "s3://4")
        assert folders(bundles) == {copies[0], copies[2], fourth}
        fifth = copy_of(tiny_bundle, "s3://5")
        assert folders(bundles) == {copies[2], fourth, fifth}
        assert not copies[0].with_suffix(".lock").exists()
        sixth = copy_of(tiny_bundle, "s3://6")  # beyond the limit, since all are used
        assert folders(bundles) == {copies[2], fourth, fifth, sixth}


def test_a_process_holds_its_latest_copies(tiny_bundle, bundles, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    monkeypatch.setenv("GLAD_CACHE_GB", "0")
    copies = [copy_of(tiny_bundle, f"s3://{number}") for number in range(4)]
    assert folders(bundles) == set(copies[1:])  # the fourth was made while two were held


def test_what_a_killed_process_left_is_swept(tiny_bundle, bundles):
    half = bundles / "0123.part" / "unet"
    half.mkdir(parents=True)
    (half / "weights").write_bytes(b"half")
    assert verify(copy_of(tiny_bundle)) == verify(tiny_bundle)
    assert len(folders(bundles)) == 1


def test_a_copy_that_lost_a_file_is_made_anew(tiny_bundle, bundles):
    copy = copy_of(tiny_bundle)
    others_use_nothing()
    (copy / "prompt.safetensors").unlink()
    assert verify(copy_of(tiny_bundle)) == verify(tiny_bundle)


def test_a_bundle_that_is_replaced_meanwhile_is_no_copy(tiny_bundle, bundles, tmp_path):
    changed = Path(shutil.copytree(tiny_bundle, tmp_path / "changed"))
    weights = changed / "prompt.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(GladError, match=r"^s3://b/bundle: damaged bundle, prompt\.safetensors does not match") as error:
        copy_of(changed)
    assert "\n" not in str(error.value)
    assert folders(bundles) == set()


def test_a_disk_without_room_is_one_line(tiny_bundle, bundles, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(total=4e9, free=1e6))
    with pytest.raises(StorageError, match=r"0\.00 GB are free on that disk, too few for a copy of s3://b/bundle") as e:
        copy_of(tiny_bundle)
    assert "\n" not in str(e.value)
    assert str(bundles) in str(e.value)
    assert "GLAD_CACHE" in str(e.value)


def test_a_cache_that_cannot_be_made_is_named(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file/bundles: no copy of s3://b/bundle can be kept there \(.*GLAD_CACHE"):
        copy_of(tiny_bundle)


@pytest.mark.parametrize("value", ["many", "-1", "nan"])
def test_a_limit_that_is_no_number_is_one_line(tiny_bundle, bundles, monkeypatch, value):
    monkeypatch.setenv("GLAD_CACHE_GB", value)
    with pytest.raises(GladError, match=f"GLAD_CACHE_GB={value}: give the gigabytes"):
        copy_of(tiny_bundle)


def test_settings_make_another_copy(tiny_bundle, bundles, tmp_path):
    changed = Path(shutil.copytree(tiny_bundle, tmp_path / "changed"))
    update_settings(changed, Settings.parse({"threshold": 9.0}, "test"), {})
    assert {copy_of(tiny_bundle), copy_of(changed)} == folders(bundles)
    assert len(folders(bundles)) == 2
