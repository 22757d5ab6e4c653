import os

import pytest
from conftest import make_bucket

from cluster.storage import Storage, StorageError
from glad_core.bundle.glad_json import read_description, verify, with_settings
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.models.find import describe, local_bundle
from pipelines.models.variant import check_free, write_variant

STORAGE = Storage()


def changed(bundle):
    description = read_description(bundle)
    settings = Settings.parse(description.settings, "test").model_copy(update={"threshold": 9.0})
    return with_settings(description, settings, {"target_fpr": 0.1})


def test_a_variant_is_a_whole_bundle_of_its_own_or_linked(tiny_bundle, tmp_path):
    description, weights = changed(tiny_bundle), "unet/diffusion_pytorch_model.safetensors"
    for linked in (False, True):
        out = tmp_path / "new" / str(linked)
        check_free(str(out), STORAGE)
        write_variant(str(tiny_bundle), description, str(out), STORAGE, linked)
        assert verify(out) == description
        assert os.path.samefile(out / weights, tiny_bundle / weights) == linked
        with pytest.raises(GladError, match="already exists"):
            check_free(str(out), STORAGE)
        with pytest.raises(GladError, match="already exists"):
            write_variant(str(tiny_bundle), description, str(out), STORAGE)
    assert read_description(tiny_bundle).settings["threshold"] == 3.6
    with pytest.raises(StorageError, match="no such file"):
        write_variant(str(tmp_path / "none"), description, str(tmp_path / "x"), STORAGE)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_between_disk_and_s3(tiny_bundle, tmp_path, s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLAD_CACHE", str(tmp_path / "cache"))
    make_bucket(s3_server, "variant")
    make_bucket(s3_server, "other")
    storage, description = Storage.from_environment(), changed(tiny_bundle)
    up, across = "s3://variant/up", "s3://other/across"
    check_free(up, storage)
    storage.write(f"{up}/unet/config.json", b"of a command that was killed")
    check_free(up, storage)
    write_variant(str(tiny_bundle), description, up, storage)
    with pytest.raises(GladError, match="already exists"):
        check_free(up, storage)
    write_variant(up, description, across, storage)
    assert not (tmp_path / "cache").exists()
    assert verify(local_bundle(across, storage)) == describe(up, storage) == description
    write_variant(across, description, str(tmp_path / "down"), storage, linked=True)
    assert verify(tmp_path / "down") == description
    storage.write("s3://variant/taken/notes.txt", b"x")
    with pytest.raises(GladError, match="already exists"):
        check_free("s3://variant/taken", storage)
