import json
import shutil
from pathlib import Path

import pytest
import safetensors

from glad_core.bundle.glad_json import read_description, update_settings, verify, versions
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError


@pytest.fixture
def copy(tiny_bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_new_settings_make_a_new_id_and_the_same_weights(copy: Path) -> None:
    before = read_description(copy)
    changed = Settings(**before.settings | {"threshold": 1.25})
    assert update_settings(copy, changed, {"calibrated": True}) != before.model_id
    after = verify(copy)
    assert after.files == before.files
    assert after.settings["threshold"] == 1.25
    assert after.provenance["calibrated"]


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "unet/diffusion_pytorch_model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "unet/diffusion_pytorch_model.safetensors").write_bytes(data)


def rewrite(path: Path, **changes) -> None:
    description = json.loads((path / "glad.json").read_text())
    (path / "glad.json").write_text(json.dumps(description | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "glad.json").unlink(), "has no glad.json"),
        (lambda path: (path / "glad.json").write_text("{"), "damaged or of another program"),
        (lambda path: (path / "prompt.safetensors").unlink(), "prompt.safetensors is missing"),
        (lambda path: (path / "vae/config.json").write_text("{}"), "instead of"),
        (flip_a_byte, "does not match its sha256"),
        (lambda path: (path / "unet/extra.bin").write_text("x"), "not listed in glad.json"),
        (lambda path: rewrite(path, schema_version=2), "schema version 2"),
        (lambda path: rewrite(path, settings={"start_stepp": 3}), "did you mean 'start_step'"),
        (lambda path: rewrite(path, category="other"), "changed by hand"),
        (shutil.rmtree, "no such model bundle"),
    ],
)
def test_a_bad_bundle_is_one_line(copy: Path, damage, words: str) -> None:
    damage(copy)
    with pytest.raises(GladError, match=words) as caught:
        load_bundle(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_a_package_that_was_not_installed_has_no_version():
    known = versions("safetensors", "glad-that-nobody-installed")
    assert known == {"safetensors": safetensors.__version__, "glad-that-nobody-installed": "unknown"}
