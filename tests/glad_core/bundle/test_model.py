import shutil
from pathlib import Path

import pytest
import torch

from glad_core.bundle.glad_json import verify
from glad_core.bundle.model import load_bundle, save_bundle
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
