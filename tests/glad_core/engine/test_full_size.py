"""The networks of the paper at their real size, with random weights, on an image small enough for a CPU."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from glad_core import schedule
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Settings
from glad_core.features import create_backbone
from glad_core.judge import detect
from glad_core.verdict import Request


@pytest.mark.slow
def test_stable_diffusion_and_dino_vit_b8_judge_an_image():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the other defaults are SD v1's
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    vit = create_backbone("vit_base_patch8_224.dino")
    model = Model(
        unet=unet.eval(),
        vae=vae.eval(),
        features=vit,
        final_features=vit,
        prompt_cond=torch.randn(1, 77, 768),
        prompt_uncond=torch.randn(1, 77, 768),
        alphas=schedule.alphas_cumprod(),
        settings=Settings(resolution=64, feature_resolution=64, start_step=750, inference_steps=2, delta=1e-3),
        category="",
        model_id="",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (result,) = detect(model, [Request("image", image)])
    assert np.isfinite(result.score)
    assert result.anomaly_map.shape == (8, 8)
    assert result.stop_reason == "difference"
