import pytest
import torch

from glad_core import features
from glad_core.errors import GladError


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_tokens_agree_with_timm_at_the_native_size(architecture: str) -> None:
    """Class token, register tokens and layer scale as timm has them."""
    torch.manual_seed(0)
    vit = features.create_vit(architecture, img_size=56, patch_size=14, embed_dim=48, depth=4, num_heads=3)
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        ours = features.patch_tokens(vit, images, [1, 4])
        theirs = vit.forward_intermediates(
            images, indices=[0, 3], norm=False, output_fmt="NLC", intermediates_only=True
        )
    for mine, timms in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, timms, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("depth", "blocks"), [(12, [3, 6, 9, 12]), (4, [1, 2, 3, 4]), (6, [2, 3, 4, 6]), (1, [1])])
def test_four_blocks_evenly_spread(depth: int, blocks: list[int]) -> None:
    vit = features.create_vit("vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=1, depth=depth)
    assert features.used_blocks(vit) == blocks


def test_any_size_divisible_by_the_patch(tiny_bundle) -> None:
    vit = features.create_vit("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, num_heads=1, depth=2)
    assert features.patch_tokens(vit, torch.zeros(1, 3, 88, 88), [2])[0].shape == (1, 121, 12)
    with pytest.raises(GladError, match="divisible by the patch 8"):
        features.patch_tokens(vit, torch.zeros(1, 3, 30, 30), [2])


def test_wrong_names_are_one_line() -> None:
    with pytest.raises(GladError, match="timm has no model"):
        features.create_vit("vit_of_nobody")
    with pytest.raises(GladError, match="needs a timm VisionTransformer"):
        features.create_vit("resnet18")
