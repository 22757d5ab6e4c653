"""`glad bundle`: from a Stable Diffusion folder and an authors' checkpoint, and what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

from glad_core.bundle import presets
from glad_core.bundle.glad_json import read_description
from glad_core.bundle.model import load_bundle
from glad_core.errors import GladError
from glad_core.features import timm_network
from pipelines.cli.main import app

FEATURES = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    """A folder in the format of CompVis/stable-diffusion-v1-4 with tiny random networks."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sd")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(root / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).save_pretrained(root / "vae")
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words += list("abcdefghijklmnopqrstuvwxyz")
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"), model_max_length=20).save_pretrained(
        tokenizer
    )
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=20,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(root / "text_encoder")
    return root


@pytest.fixture
def offline_timm(monkeypatch):
    """timm's pretrained weights come from the hub; random ones stand in for them."""
    monkeypatch.setattr(
        "pipelines.models.make.timm_network",
        lambda name, strides=None, pretrained=False: timm_network(name, strides=strides),
    )


def glad(*arguments):
    return CliRunner().invoke(app, ["bundle", *map(str, arguments)])


def refused(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


@pytest.mark.usefixtures("offline_timm")
def test_create_then_import_then_inspect(tmp_path, stable_diffusion):
    first, second = tmp_path / "screw", tmp_path / "authors"
    outcome = glad("create", stable_diffusion, "--out", first, "--features", FEATURES, "--preset", "MVTec-AD/screw")
    assert outcome.exit_code == 0, outcome.output
    model = load_bundle(first)
    assert model.category == "screw"
    assert model.settings.delta == 0.32
    assert model.prompt_cond.shape == model.prompt_uncond.shape == (1, 20, 16)
    assert not torch.equal(model.prompt_cond, model.prompt_uncond)

    checkpoint = tmp_path / "checkpoint-500"
    checkpoint.mkdir()
    tuned = {name: weight + 1 for name, weight in model.unet.state_dict().items()}
    torch.save(tuned, checkpoint / "pytorch_model.bin")
    imported = glad("import-unet", first, checkpoint, "--out", second)
    assert imported.exit_code == 0, imported.output
    for name, weight in load_bundle(second).unet.state_dict().items():
        assert torch.equal(weight, tuned[name])
    for bundle in (first, second):  # the defaults of `glad train`
        recipe = read_description(bundle).provenance["recipe"]
        assert recipe == presets.training_preset("MVTec-AD", "screw")

    shown = glad("inspect", second)
    assert shown.exit_code == 0
    for word in ("verified", "screw", "0.32", "unet", read_description(second).model_id, FEATURES, "apache-2.0"):
        assert word in shown.stdout
    assert json.loads(glad("inspect", second, "--json").stdout)["features"]["licence"] == "apache-2.0"


@pytest.mark.usefixtures("offline_timm")
@pytest.mark.parametrize(
    ("features", "said", "side", "strides"),
    [
        ("test_efficientnet.r160_in1k:8,16,32", "strides 8, 16, 32; licence of its weights: ", 512, [8, 16, 32]),
        ("test_vit_relpos", "compared at 160 pixels instead of 512: this network takes 160", 160, [16] * 4),
    ],
)
def test_features_by_name(features, said, side, strides, tmp_path, stable_diffusion):
    outcome = glad("create", stable_diffusion, "--out", tmp_path / "b", "--features", features)
    assert outcome.exit_code == 0, outcome.output
    assert said in outcome.stderr
    model = load_bundle(tmp_path / "b")
    assert model.settings.feature_resolution == side
    assert model.features.strides == strides


@pytest.mark.usefixtures("offline_timm")
@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("no_such_network", "timm has no model 'no_such_network'"),
        ("no_such_network:8", "timm has no model"),
        ("vit_tiny_patch16_224:8,16", "blocks of one stride, 16: give its name alone"),
        ("resnet18.a1_in1k:8,12", "no stage of stride 12"),
        ("resnet18:8,", "give a timm name"),
        ("hf-hub:evil/model", "give a timm name"),
    ],
)
def test_features_that_there_are_not(features, words, tmp_path, stable_diffusion):
    refused(glad("create", stable_diffusion, "--out", tmp_path / "b", "--features", features), words)


@pytest.mark.usefixtures("offline_timm")
def test_mistakes_of_create_are_one_line(tmp_path, stable_diffusion, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no minutes of retries without a network
    out = tmp_path / "out"
    refused(glad("create", stable_diffusion, "--out", out, "--preset", "MVTec-AD/scrw"), "did you mean 'screw'")
    refused(glad("create", tmp_path, "--out", out), "is it a diffusers folder")
    refused(glad("create", "nobody/no-such-model", "--out", out), "no such folder", "hub")
    pickled = tmp_path / "pickled" / "unet"
    pickled.mkdir(parents=True)
    (pickled / "config.json").write_text((stable_diffusion / "unet/config.json").read_text())
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    refused(glad("create", pickled.parent, "--out", out), "never loaded", "safetensors")
    assert not out.exists()


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_is_never_executed_nor_half_taken(tmp_path, tiny_bundle, capfd):
    file, out = tmp_path / "pytorch_model.bin", tmp_path / "out"
    torch.save(Malicious(), file)
    refused(glad("import-unet", tiny_bundle, file, "--out", out), "not a safe checkpoint")
    assert "executed" not in capfd.readouterr().out
    torch.save({"other.weight": torch.zeros(1)}, file)
    refused(glad("import-unet", tiny_bundle, file, "--out", out), "not a checkpoint of this base's UNet")
    refused(glad("import-unet", tiny_bundle, tmp_path / "none", "--out", out), "no such file")
    assert not out.exists()


def test_the_default_features_exist_in_timm():
    assert "vit_base_patch8_224.dino" in timm.list_models("vit*", pretrained=True)


@pytest.mark.usefixtures("offline_timm")
def test_a_bundle_for_several_categories_has_a_prompt_for_each(tmp_path, stable_diffusion):
    out = tmp_path / "several"
    options = ["--features", FEATURES, "--preset", "MVTec-AD/cable", "--category", "cable,screw"]
    outcome = glad("create", stable_diffusion, "--out", out, *options)
    assert outcome.exit_code == 0, outcome.output
    model = load_bundle(out)
    assert model.settings.start_step == 650
    assert model.settings.resolution == 256
    both = model.prompts_for(["cable", "screw", "cable"])
    assert both.shape == (3, 20, 16)
    assert torch.equal(both[0], both[2])
    assert not torch.equal(both[0], both[1])
    with pytest.raises(GladError, match="'bottle' is none of this bundle's"):
        model.prompts_for(["bottle"])
