import pytest
import timm
import torch

from glad_core import features
from glad_core.errors import GladError

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}
VITS = {  # one for every kind of prefix, position and patch
    "DINO": ("vit_tiny_patch16_224", {"patch_size": 8}, 64),
    "DINOv2": ("vit_small_patch14_dinov2", {}, 56),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}, 56),
    "DINOv3": ("vit_small_patch16_dinov3", {}, 64),
    "EVA-02": ("eva02_tiny_patch14_224", {}, 56),
    "SigLIP, no prefix": ("vit_base_patch16_siglip_224", {}, 64),
    "CLIP": ("vit_base_patch16_clip_224", {}, 64),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {}, 64),
}
BY_DINOS_RULE = ("DINO", "DINOv2", "CLIP")


@pytest.mark.parametrize("kind", VITS)
def test_tokens_of_a_vision_transformer_agree_with_timm(kind: str) -> None:
    """At the native size and, but for DINO's own positions, at another; without prefix tokens, before the last norm."""
    architecture, args, native = VITS[kind]
    torch.manual_seed(0)
    args = {**SMALL, **args, "img_size": native}
    backbone = features.create_backbone(architecture, **args)
    theirs = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, **args).eval()
    theirs.load_state_dict(backbone.net.state_dict())
    for side in (native, native + backbone.multiple):
        images = torch.randn(2, 3, side, side)
        with torch.inference_mode():
            ours = backbone(images)
            expected = theirs.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)
            [last] = backbone(images, last=True)
        assert len(ours) == len(expected) == 4
        assert torch.equal(last, ours[-1])
        # Positions resized by DINO's rule are nearly those resized by timm's.
        close = {"rtol": 0, "atol": 1e-5 if side == native or kind not in BY_DINOS_RULE else 0.1}
        for mine, timms in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, timms, **close)
    assert backbone.fitting(native + 1) == native


PYRAMIDS = [
    ("test_efficientnet", None, [8, 16]),
    ("test_resnet", (16, 8, 32), [8, 16, 32]),
    ("test_convnext", (4, 8), [4, 8]),
    ("test_byobnet", None, [8, 16]),
]


@pytest.mark.parametrize(("architecture", "strides", "compared"), PYRAMIDS)
def test_stages_of_a_pyramid_agree_with_timm(architecture: str, strides: tuple[int, ...] | None, compared: list[int]):
    torch.manual_seed(0)
    backbone = features.create_backbone(architecture, strides=strides)
    reductions = timm.create_model(architecture, features_only=True).feature_info.reduction()
    indices = [reductions.index(stride) for stride in compared]
    theirs = timm.create_model(architecture, features_only=True, out_indices=indices).eval()
    names = {name.replace("_", "."): value for name, value in backbone.net.state_dict().items()}
    kept = {name: names[name.replace("_", ".")] for name in theirs.state_dict() if name.replace("_", ".") in names}
    assert len(kept) == len(names)
    theirs.load_state_dict(kept, strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        [ours] = backbone(images)
        maps = theirs(images)
        [same] = backbone(images, last=True)
    assert backbone.strides == compared
    assert torch.equal(ours, same)
    side = 64 // compared[0]
    assert ours.shape[1] == side**2
    torch.testing.assert_close(ours.norm(dim=2), torch.ones(2, side**2))
    start = 0
    for map_BCgg in maps:
        width = map_BCgg.shape[1]
        mine = ours[..., start : start + width].transpose(1, 2).unflatten(2, (side, side)) * len(maps) ** 0.5
        whole = torch.nn.functional.interpolate(map_BCgg, size=(side, side), mode="bilinear")
        torch.testing.assert_close(mine, torch.nn.functional.normalize(whole, dim=1), rtol=0, atol=1e-5)
        start += width
    assert start == ours.shape[2]
    assert backbone.fitting(100) == round(100 / compared[-1]) * compared[-1]


def test_what_comes_after_the_last_stage_compared_is_cut_off() -> None:
    whole = timm.create_model("test_efficientnet", num_classes=0)
    kept = features.create_backbone("test_efficientnet").net
    assert not any(name.startswith(("blocks.4", "conv_head")) for name in kept.state_dict())
    assert any(name.startswith("blocks.4") for name in whole.state_dict())


@pytest.mark.parametrize(("depth", "layers"), [(12, [2, 5, 8, 11]), (4, [0, 1, 2, 3]), (6, [1, 2, 3, 5]), (1, [0])])
def test_four_blocks_evenly_spread(depth: int, layers: list[int]) -> None:
    assert features.create_backbone("vit_tiny_patch16_224", **{**SMALL, "depth": depth}).layers == layers


@pytest.mark.parametrize(("side", "grid"), [(88, 11), (30, 4), (3, 1)])
def test_images_of_any_size_are_brought_to_the_nearest_that_fits(side: int, grid: int) -> None:
    backbone = features.create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, **SMALL)
    assert backbone(torch.zeros(1, 3, side, side))[0].shape == (1, grid**2, 48)


@pytest.mark.parametrize(("architecture", "begin"), [("test_resnet", ("layer2.", "layer3.")), ("vgg11", ())])
def test_stages_are_adapted_if_they_have_weights(architecture: str, begin: tuple[str, ...]) -> None:
    """timm names an activation as the end of a stage of VGG."""
    backbone = features.create_backbone(architecture)
    if not begin:
        with pytest.raises(GladError, match="features of a VGG cannot be adapted"):
            backbone.adaptable()
        return
    chosen = {id(weight) for weight in backbone.adaptable()}
    assert {name for name, weight in backbone.net.named_parameters() if id(weight) in chosen} == {
        name for name, _ in backbone.net.named_parameters() if name.startswith(begin)
    }


def test_a_network_of_one_size_gets_images_of_that_size() -> None:
    backbone = features.create_backbone("test_vit_relpos")
    assert backbone.sizes == "160"
    assert backbone.fitting(512) == 160
    assert backbone(torch.zeros(1, 3, 48, 48))[0].shape[1] == 100


def test_colours_are_normalised_as_the_weights_were_trained() -> None:
    net = features.timm_network("test_resnet")
    images = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    torch.testing.assert_close(features.Backbone(net, mean=(0.5,) * 3, std=(0.5,) * 3).normalize(images), images)
    paper = features.Backbone(net).normalize(images)
    torch.testing.assert_close(paper[0, 0, 0, 0], torch.tensor(-0.485 / 0.229))


@pytest.mark.parametrize(
    ("architecture", "strides", "words"),
    [
        ("vit_of_nobody", None, "timm has no model"),
        ("vit_tiny_patch16_224", [8, 16], "blocks of one stride, 16"),
        ("test_resnet", [8, 12], "no stage of stride 12: choose two or three of 2, 4, 8, 16, 32"),
    ],
)
def test_what_cannot_be_compared_is_one_line(architecture: str, strides: list[int] | None, words: str) -> None:
    with pytest.raises(GladError, match=words):
        features.create_backbone(architecture, strides=strides)
