import shutil
from pathlib import Path

import pytest
import torch

import glad_core
from glad_core.bundle.glad_json import verify
from glad_core.bundle.model import load_bundle, save_bundle, save_derived
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError


@pytest.fixture
def copy(tiny_bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_what_is_saved_is_loaded(tiny_bundle) -> None:
    model = load_bundle(tiny_bundle)
    description = verify(tiny_bundle)
    assert model.model_id == description.model_id
    assert model.settings == Settings(**description.settings)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    assert model.alphas.shape == (1000,)


def test_settings_the_networks_cannot_run_are_refused(tiny_bundle) -> None:
    settings = load_bundle(tiny_bundle).settings.model_copy(update={"feature_resolution": 36})
    with pytest.raises(GladError, match="feature_resolution 36 does not fit"):
        load_bundle(tiny_bundle, settings=settings)


def test_an_existing_folder_is_not_overwritten(copy: Path) -> None:
    model = load_bundle(copy)
    with pytest.raises(GladError, match="already exists"):
        save_bundle(
            copy,
            unet=model.unet,
            vae=model.vae,
            features=model.features,
            features_config={},
            prompt_cond=torch.zeros(1, 1, 16),
            prompt_uncond=torch.zeros(1, 1, 16),
            settings=model.settings,
            category="",
            provenance={},
        )
    assert verify(copy)


def test_the_id_of_a_derived_bundle_does_not_depend_on_where_its_base_lies(tiny_bundle, copy: Path, tmp_path) -> None:
    ids = set()
    for number, base in enumerate((Path(tiny_bundle), copy)):
        model = load_bundle(base)
        out = tmp_path / f"derived{number}"
        ids.add(save_derived(out, base, model, model.settings, category="widget", provenance={}))
        assert "_name_or_path" not in (out / "unet/config.json").read_text()
        assert load_bundle(out).model_id in ids
    assert len(ids) == 1


def test_the_small_bundle_keeps_its_id() -> None:
    assert load_bundle(Path(glad_core.__file__).parent / "small_bundle").model_id == "752498126a23ea7f"


@pytest.mark.parametrize("part", ["unet", "vae", "features"])
def test_weights_that_are_not_finite_are_not_saved(part: str, tiny_bundle, tmp_path) -> None:
    model = load_bundle(tiny_bundle)
    next(getattr(model, part).parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(GladError, match="no bundle was written") as caught:
        save_derived(tmp_path / "out", Path(tiny_bundle), model, model.settings, category="", provenance={})
    assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []
