"""Every damaged or hostile bundle is refused in one line, also if its checksums were computed anew."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glad_core.bundle.glad_json import GLAD_JSON, read_description, write_description
from glad_core.bundle.model import load_bundle
from glad_core.errors import GladError

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
VIT, PROMPT = "features/model.safetensors", "prompt.safetensors"
HUGE = 10**9


def seal(path: Path) -> None:
    """What an attacker does last: checksums and model id that fit."""
    description = json.loads((path / GLAD_JSON).read_text())
    write_description(path, description["settings"], description["category"], description["provenance"])


def tensors(file, change):
    """A damage: the file's tensors as ``change`` leaves them."""

    def damage(path):
        values = load_file(path / file)
        change(values)
        save_file(values, path / file)
        seal(path)

    return damage


def filled(file, value):
    def change(values):
        name = sorted(values)[-1]
        values[name] = values[name].clone()
        values[name].view(-1)[-1] = value

    return tensors(file, change)


def config(part, **changes):
    """A damage: other values in the part's JSON file; of None the key is deleted."""
    file = {"scheduler": "scheduler/scheduler_config.json"}.get(part, f"{part}/config.json")

    def damage(path):
        values = json.loads((path / file).read_text()) | changes
        (path / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        seal(path)

    return damage


def vit(**arguments):
    return config("features", args={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4} | arguments)


def text(file, content):
    def damage(path):
        (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        seal(path)

    return damage


def description(**changes):
    """A damage: other values in glad.json, nothing else recomputed."""

    def damage(path):
        values = json.loads((path / GLAD_JSON).read_text())
        (path / GLAD_JSON).write_text(json.dumps(values | changes))

    return damage


def settings(**changes):
    def damage(path):
        values = json.loads((path / GLAD_JSON).read_text())
        values["settings"] |= changes
        (path / GLAD_JSON).write_text(json.dumps(values))
        seal(path)

    return damage


def listed(name):
    """A damage: glad.json lists a file of this name."""

    def damage(path):
        values = json.loads((path / GLAD_JSON).read_text())
        values["files"][name] = values["files"][PROMPT]
        (path / GLAD_JSON).write_text(json.dumps(values))

    return damage


def unlisted(name):
    def damage(path):
        values = json.loads((path / GLAD_JSON).read_text())
        del values["files"][name]
        (path / GLAD_JSON).write_text(json.dumps(values))

    return damage


def cut(file, size):
    def damage(path):
        os.truncate(path / file, size)
        seal(path)

    return damage


def forged_header(path):
    """A header that promises more than the file holds."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4 * HUGE**2]}}).encode()
    (path / UNET).write_bytes(struct.pack("<Q", len(header)) + header)
    seal(path)


def link(path):
    (path / UNET).rename(path.parent / "elsewhere")
    (path / UNET).symlink_to(path.parent / "elsewhere")


def folder_for_file(path):
    (path / PROMPT).unlink()
    (path / PROMPT).mkdir()


def file_for_folder(path):
    shutil.rmtree(path / "vae")
    (path / "vae").write_text("x")


def pipe_for_file(path):
    (path / PROMPT).unlink()
    os.mkfifo(path / PROMPT)


def half_final(path):
    shutil.copytree(path / "features", path / "final_features")
    (path / "final_features/model.safetensors").unlink()
    seal(path)


def transposed(values):
    name = next(name for name, value in values.items() if value.dim() == 2 and value.shape[0] != value.shape[1])
    values[name] = values[name].T.contiguous()


DAMAGE = {
    # weights
    "unet tensor missing": (tensors(UNET, lambda values: values.pop("conv_in.weight")), "'conv_in.weight' is missing"),
    "vae tensor missing": (
        tensors(VAE, lambda values: values.pop("encoder.conv_in.bias")),
        "'encoder.conv_in.bias' is",
    ),
    "vit tensor missing": (tensors(VIT, lambda values: values.pop("pos_embed")), "'pos_embed' is missing"),
    "all tensors missing": (tensors(VAE, lambda values: values.clear()), "is missing"),
    "surplus tensor": (tensors(UNET, lambda values: values.update(x=torch.ones(1))), "'x' is not one of this network"),
    "surplus vit tensor": (tensors(VIT, lambda values: values.update(x=torch.ones(1))), "'x' is not one"),
    "transposed tensor": (tensors(UNET, transposed), "its configuration says"),
    "flat tensor": (tensors(VIT, lambda values: values.update(pos_embed=torch.ones(3))), "'pos_embed' is [3]"),
    "whole numbers": (tensors(VIT, lambda values: values.update(pos_embed=torch.ones(1, 17, 32).int())), "type I32"),
    "unet nan": (filled(UNET, float("nan")), "not finite"),
    "unet inf": (filled(UNET, float("inf")), "not finite"),
    "vae minus inf": (filled(VAE, float("-inf")), "not finite"),
    "vit nan": (filled(VIT, float("nan")), "not finite"),
    "prompt nan": (filled(PROMPT, float("nan")), "not finite"),
    "beyond float32": (
        tensors(VIT, lambda values: values.update(pos_embed=torch.full((1, 17, 32), 1e300, dtype=torch.float64))),
        "not finite",
    ),
    "truncated weights": (cut(UNET, 5000), "not a readable safetensors file"),
    "empty weights": (cut(VIT, 0), "not a readable safetensors file"),
    "empty prompts": (cut(PROMPT, 0), "not a readable safetensors file"),
    "a pickle as weights": (text(VAE, b"PK\x03\x04" + b"\0" * 100), "not a readable safetensors file"),
    "a header without data": (forged_header, "not a readable safetensors file"),
    "a name to confuse a terminal": (
        tensors(UNET, lambda values: values.update({"a\n\x1b[2J": torch.ones(1)})),
        "is not one",
    ),
    # prompts
    "no unconditional prompt": (tensors(PROMPT, lambda values: values.pop("uncond")), "'uncond' is missing"),
    "no prompts": (tensors(PROMPT, lambda values: values.clear()), "is missing"),
    "an unknown prompt": (tensors(PROMPT, lambda values: values.update(x=values["cond"].clone())), "'x' is not one"),
    "a flat prompt": (tensors(PROMPT, lambda values: values.update(cond=torch.ones(3))), "not [1, L, D]"),
    "a longer prompt": (
        tensors(PROMPT, lambda values: values.update(uncond=torch.ones(1, 9, 16))),
        "'uncond' is [1, 9",
    ),
    "a narrow prompt": (
        tensors(PROMPT, lambda values: values.update(cond=torch.ones(1, 4, 3), uncond=torch.ones(1, 4, 3))),
        "prompt embeddings are 3 wide",
    ),
    # configurations
    "no json": (text("unet/config.json", "{"), "damaged"),
    "not utf-8": (text("vae/config.json", b"\xff\xfe{}"), "damaged"),
    "a list": (text("features/config.json", "[1]"), "not a JSON object"),
    "a number": (text("scheduler/scheduler_config.json", "7"), "not a JSON object"),
    "an empty object": (text("unet/config.json", "{}"), "block"),
    "nested without end": (text("unet/config.json", '{"a":' * 100_000), "damaged"),
    "a huge json": (text("vae/config.json", b" " * 2_000_000), "larger than"),
    "nan in json": (text("features/config.json", '{"architecture": "vit_tiny_patch16_224", "args": NaN}'), "damaged"),
    "another class": (config("unet", _class_name="UNet3DConditionModel"), "describes a 'UNet3DConditionModel'"),
    "code of its own": (config("unet", auto_map={"AutoModel": "evil.Model"}), "unknown setting 'auto_map'"),
    "a quantizer": (config("vae", quantization_config={"quant_method": "x"}), "unknown setting 'quantization_config'"),
    "another conditioning": (config("unet", class_embed_type="timestep"), "'class_embed_type' must be None"),
    "an unknown block": (config("unet", down_block_types=["KDownBlock2D", "KDownBlock2D"]), "down_block_types"),
    "a word for a number": (config("unet", in_channels="4"), "in_channels"),
    "a truth for a number": (config("unet", in_channels=True), "in_channels"),
    "negative channels": (config("vae", latent_channels=-4), "latent_channels"),
    "no channels": (config("vae", block_out_channels=[16, 0]), "block_out_channels"),
    "huge channels": (config("unet", block_out_channels=[HUGE, HUGE]), "block_out_channels"),
    "large channels": (config("unet", block_out_channels=[65_536, 65_536]), "is not one of this network"),
    "many layers": (config("unet", layers_per_block=HUGE), "layers_per_block"),
    "many blocks": (config("vae", block_out_channels=[16] * 1000), "block_out_channels"),
    "groups that do not divide": (config("unet", norm_num_groups=7), "no network can be built"),
    "blocks that do not fit": (config("unet", block_out_channels=[16]), "no network can be built"),
    "infinite scaling": (text("vae/config.json", '{"scaling_factor": Infinity}'), "damaged"),
    "no scaling": (config("vae", scaling_factor=0.0), "scaling_factor"),
    "other latents": (config("vae", latent_channels=5), "its configuration says"),
    "velocity": (config("scheduler", prediction_type="v_prediction"), "needs an epsilon model"),
    "endless schedule": (config("scheduler", num_train_timesteps=HUGE), "num_train_timesteps"),
    "short schedule": (config("scheduler", num_train_timesteps=10), "beyond the schedule"),
    "negative betas": (config("scheduler", beta_start=-1.0), "beta_start"),
    "no signal at the end": (config("scheduler", rescale_betas_zero_snr=True), "leaves nothing of an image"),
    "unknown betas": (config("scheduler", beta_schedule="x"), "beta_schedule"),
    "unknown scheduler": (config("scheduler", _class_name="os.system"), "describes a 'os.system'"),
    "two lines for a type": (config("scheduler", prediction_type="a\nb"), "needs an epsilon model"),
    "two lines for a key": (config("unet", **{"a\n\x1b[2J": 1}), "unknown setting 'a ?[2J'"),
    # the ViT through timm
    "no architecture": (config("features", architecture=None), "architecture"),
    "unknown architecture": (config("features", architecture="vit_of_nobody"), "timm has no model"),
    "no ViT": (config("features", architecture="resnet18", args={}), "is not one of this network"),
    "a hub name": (config("features", architecture="hf-hub:evil/model"), "timm has no model"),
    "an old hub name": (config("features", architecture="hf_hub:evil/model"), "timm has no model"),
    "a folder": (config("features", architecture="local-dir:/tmp/evil"), "timm has no model"),
    "a path": (config("features", architecture="../../evil"), "timm has no model"),
    "an unknown tag": (config("features", architecture="vit_tiny_patch16_224.evil"), "timm has no weights"),
    "a checkpoint": (vit(checkpoint_path="/tmp/evil.bin"), "checkpoint_path"),
    "pretrained": (vit(pretrained=True), "pretrained"),
    "pretrained_cfg": (vit(pretrained_cfg={"url": "http://evil"}), "pretrained_cfg"),
    "an overlay": (vit(pretrained_cfg_overlay={"file": "/tmp/evil.bin"}), "pretrained_cfg_overlay"),
    "a cache": (vit(cache_dir="/tmp/evil"), "cache_dir"),
    "scriptable": (vit(scriptable=True), "scriptable"),
    "a layer by name": (vit(norm_layer="os.system"), "norm_layer"),
    "huge width": (vit(embed_dim=HUGE), "embed_dim"),
    "large width": (vit(embed_dim=65_536, num_heads=2), "its configuration says"),
    "huge depth": (vit(depth=HUGE), "depth"),
    "huge image": (vit(img_size=HUGE), "img_size"),
    "heads that do not divide": (vit(num_heads=5), "no network can be built"),
    "no such stage": (
        config("features", architecture="test_resnet", args={}, strides=[8, 12]),
        "no stage of stride 12",
    ),
    "strides of a ViT": (config("features", strides=[8, 16]), "blocks of one stride"),
    "no stages": (config("features", architecture="test_resnet", args={}, strides=[]), "strides"),
    "a negative colour": (config("features", mean=[0.5, 0.5, -1.0]), "mean.2"),
    "no spread of colours": (config("features", std=[0.2, 0.2, 0.0]), "std.2"),
    "two lines for a licence": (config("features", licence="free\nrm -rf"), "licence"),
    "arguments in a list": (config("features", args=["checkpoint_path"]), "args"),
    # settings
    "nan threshold": (settings(threshold=float("nan")), GLAD_JSON),
    "infinite delta": (settings(delta=1e999), GLAD_JSON),
    "huge resolution": (settings(resolution=HUGE), "resolution"),
    "a blur wider than the map": (settings(blur_sigma=1e6), "blur_sigma"),
    "two lines for a category": (settings(thresholds={"a\nb": "x"}), "thresholds.a b"),
    # glad.json and the folder
    "glad.json a list": (lambda path: (path / GLAD_JSON).write_text("[]"), "damaged"),
    "glad.json empty": (lambda path: (path / GLAD_JSON).write_text(""), "damaged"),
    "glad.json huge": (lambda path: (path / GLAD_JSON).write_bytes(b" " * 2_000_000), "larger than"),
    "glad.json not utf-8": (lambda path: (path / GLAD_JSON).write_bytes(b"\xff"), "damaged"),
    "an id with a path": (description(model_id="../../../../evil"), "'model_id'"),
    "a category of two lines": (description(category="a\nb"), "'category'"),
    "settings a list": (description(settings=[]), "'settings'"),
    "files a list": (description(files=[]), "'files'"),
    "provenance of other types": (description(provenance={"recipe": "x"}), "'provenance.recipe'"),
    "a false rate": (description(provenance={"target_fpr": "x"}), "'provenance.target_fpr'"),
    "a file above": (listed("../evil"), "no file of a bundle"),
    "an absolute file": (listed("/etc/passwd"), "no file of a bundle"),
    "two slashes": (listed("unet//config.json"), "no file of a bundle"),
    "a backslash": (listed("unet\\config.json"), "no file of a bundle"),
    "a nul": (listed("a\0b"), "no file of a bundle"),
    "a newline": (listed("a\nb"), "no file of a bundle"),
    "a pickle": (listed("unet/diffusion_pytorch_model.bin"), "no file of a bundle"),
    "weights not listed": (unlisted(UNET), "does not list"),
    "half a second ViT": (half_final, "does not list final_features/model.safetensors"),
    "a link": (link, "is a link"),
    "a folder for a file": (folder_for_file, "prompt.safetensors is missing"),
    "a file for a folder": (file_for_folder, "'vae' is not listed"),
    "a pipe for a file": (pipe_for_file, "prompt.safetensors is missing"),
    "a surplus file": (lambda path: (path / "unet/evil.bin").write_text("x"), "not listed in glad.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_it_is_one_line(kind: str, tiny_bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    damage, words = DAMAGE[kind]
    damage(path)
    with pytest.raises(GladError) as caught:
        load_bundle(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize("name", ["config.json", "glad.json", "prompt.safetensors"])
def test_an_unreadable_file_is_one_line(name: str, tiny_bundle, tmp_path: Path, monkeypatch) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    real = Path.open

    def refuses(self, *args, **kwargs):  # root, who runs the tests on some machines, may read every file
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(GladError, match=r"cannot be read \(Permission denied\)") as caught:
        load_bundle(path)
    assert str(path) in str(caught.value)


def test_what_is_no_damage_is_loaded(tiny_bundle, tmp_path: Path) -> None:
    """The damages begin from a bundle whose resealed copy loads; half weights and where it was made do not matter."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    config("unet", _name_or_path="/somewhere/else")(path)
    halves = {name: value.half() for name, value in load_file(path / UNET).items()}
    save_file(halves, path / UNET)
    seal(path)
    model = load_bundle(path)
    assert model.model_id == read_description(path).model_id != read_description(tiny_bundle).model_id
    assert next(model.unet.parameters()).dtype == torch.float32


def test_another_model_in_its_place_is_told(tiny_bundle) -> None:
    with pytest.raises(GladError, match="this job began with 0123456789abcdef"):
        load_bundle(tiny_bundle, model_id="0123456789abcdef")
    assert load_bundle(tiny_bundle, model_id=read_description(tiny_bundle).model_id)
