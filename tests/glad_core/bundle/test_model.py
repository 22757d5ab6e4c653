import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import glad_core
from glad_core.bundle.glad_json import verify
from glad_core.bundle.model import load_bundle, save_bundle, save_derived
from glad_core.bundle.settings import Settings
from glad_core.engine import nearest
from glad_core.errors import GladError
from glad_core.features import IMAGENET_MEAN, Backbone, timm_network
from glad_core.judge import detect
from glad_core.verdict import Request


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


BACKBONES = {  # rotary angles and batch norms' counts are in no file; a stage left out, a network of one size
    "DINOv3": ({"architecture": "vit_small_patch16_dinov3", "args": {"embed_dim": 24, "depth": 2, "num_heads": 2}}, 32),
    "registers": ({"architecture": "vit_small_patch14_reg4_dinov2", "args": {"embed_dim": 24, "depth": 2}}, 28),
    "pyramid": ({"architecture": "test_resnet", "args": {}, "strides": [4, 8, 16], "mean": [0.5] * 3}, 32),
    "one size": ({"architecture": "test_vit_relpos", "args": {"img_size": 48, "depth": 2}}, 48),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_kind_of_features_is_stored_whole_and_judges(kind: str, tiny_bundle, tmp_path: Path) -> None:
    config, side = BACKBONES[kind]
    net = timm_network(config["architecture"], strides=config.get("strides"), **config["args"])
    img_size = config["args"].get("img_size")
    made = Backbone(net, strides=config.get("strides"), img_size=img_size, mean=config.get("mean", IMAGENET_MEAN))
    base = load_bundle(tiny_bundle)
    networks = {"unet": base.unet, "vae": base.vae, "features": made, "features_config": config}
    prompts = {"prompt_cond": base.prompt_cond, "prompt_uncond": base.prompt_uncond}
    settings = base.settings.model_copy(update={"feature_resolution": side})
    save_bundle(tmp_path / "bundle", **networks, **prompts, settings=settings, category="", provenance={})
    model = load_bundle(tmp_path / "bundle")
    images = torch.rand(2, 3, side, side) * 2 - 1
    with torch.inference_mode():
        for ours, theirs in zip(model.features(images), made(images), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(model.features.normalize(images), made.normalize(images))
    [detection] = detect(model, [Request("a", np.zeros((32, 32, 3), np.uint8))])
    assert np.isfinite(detection.score)
    assert nearest.patch_features(model, images).norm(dim=2).allclose(torch.tensor(1.0))
    with pytest.raises(GladError, match=f"feature_resolution {side + 3} does not fit its networks: use"):
        load_bundle(tmp_path / "bundle", settings=settings.model_copy(update={"feature_resolution": side + 3}))


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
    assert load_bundle(Path(glad_core.__file__).parent / "small_bundle").model_id == "16adb9ec991257e4"


@pytest.mark.parametrize("part", ["unet", "vae", "features"])
def test_weights_that_are_not_finite_are_not_saved(part: str, tiny_bundle, tmp_path) -> None:
    model = load_bundle(tiny_bundle)
    next(getattr(model, part).parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(GladError, match="no bundle was written") as caught:
        save_derived(tmp_path / "out", Path(tiny_bundle), model, model.settings, category="", provenance={})
    assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []
