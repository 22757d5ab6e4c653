"""`make small-model`: train the bundled CPU model from nothing on two cores.

    pictures ──▶ codec ──┐
        └──────▶ ViT  ───┴──▶ UNet (ATP) ──▶ bundle ◀── EfficientNet-Lite0

Every stage writes one folder or file in the work folder and is skipped if that exists. The numbers of iterations are
fixed, so a slower machine takes longer and gets the same model up to rounding.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel

from glad_core import schedule
from glad_core.bundle.glad_json import update_settings
from glad_core.bundle.model import AUTOCAST, load_backbone, load_bundle, save_bundle
from glad_core.bundle.settings import Settings
from glad_core.calibration import Calibrator
from glad_core.images import to_tensor
from glad_core.training import samples
from glad_core.training.loop import TrainState, fine_tune
from glad_core.training.losses import AtpLoss
from glad_core.training.recipe import Recipe
from pipelines.small_model.codec import train_codec
from pipelines.small_model.lite0 import CONFIG, lite0_features
from pipelines.small_model.pictures import board_picture, make_pool
from pipelines.small_model.vit import train_features

LOG = logging.getLogger(__name__)
UNET_RECIPE = Recipe(
    steps=2400,
    batch_size=16,
    optimizer="muon",
    learning_rate=0.02,
    lr_schedule="cosine",
    ema_decay=0.99,
    max_timestep=800,
    autocast="bf16",
)
# The defaults of `glad train` for this model, for a laptop's CPU.
FINE_TUNING = {
    "steps": 300,
    "batch_size": 16,
    "optimizer": "muon",
    "learning_rate": 0.01,
    "lr_schedule": "cosine",
    "ema_decay": 0.99,
    "max_timestep": 800,
    "autocast": "off",  # a CPU without bfloat16 units takes three times as long in bf16
}
SETTINGS = Settings(
    resolution=128,
    feature_resolution=256,  # doubled, small defects reach more of the network's places
    guidance_scale=1,
    blur_sigma=4,
    image_score_top_k=160,
    compare_with="round_trip",
    match="sum",
    window=2,
)
HELD_OUT_BOARDS = range(10_000, 10_024)  # none of them in the pool


def stage(folder: Path, make: Callable[[Path], object]) -> None:
    """Run ``make`` on a partial folder and move it to ``folder``; skipped if ``folder`` exists."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(folder)


def codec_stage(work: Path) -> None:
    """``work``/vae: the codec, in diffusers' format."""
    _one_thread()
    stage(work / "vae", lambda folder: train_codec(make_pool(work / "pool.npz"), folder))


def features_stage(work: Path) -> None:
    """``work``/features: the ViT, safetensors and its config."""
    _one_thread()
    stage(work / "features", lambda folder: train_features(make_pool(work / "pool.npz"), folder))


def unet_stage(work: Path) -> None:
    """``work``/unet: the UNet from nothing, by the same ATP loop as `glad train`, on the pool's good boards."""
    boards = make_pool(work / "pool.npz")["boards"]
    stage(work / "unet", lambda folder: _train_unet(work / "vae", boards, folder))


def _train_unet(codec: Path, boards: np.ndarray, folder: Path) -> None:
    torch.manual_seed(UNET_RECIPE.seed)
    vae = AutoencoderKL.from_pretrained(codec).eval().requires_grad_(False)
    unet = _create_unet()
    with torch.no_grad():
        batches = (to_tensor(list(boards[start : start + 32])) for start in range(0, len(boards), 32))
        posteriors = [vae.encode(images).latent_dist for images in batches]
    clean = (torch.cat([part.mean for part in posteriors]), torch.cat([part.std for part in posteriors]))
    loss = AtpLoss(
        unet,
        vae,
        schedule.alphas_cumprod(),
        clean,
        torch.zeros(1, 1, 32),
        torch.zeros(len(boards), dtype=torch.long),
        blend=UNET_RECIPE.blend,
        max_timestep=UNET_RECIPE.max_timestep,
        autocast=AUTOCAST[UNET_RECIPE.autocast],
    )
    state = TrainState.start(loss, UNET_RECIPE)
    for step in fine_tune(state, _unet_rows(boards), UNET_RECIPE):
        if step.step % 50 == 0:
            LOG.info("unet: step %d of %d, loss %.4f", step.step, UNET_RECIPE.steps, step.loss)
    state.finish()
    unet.save_pretrained(folder)


def _create_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=24,
        out_channels=24,
        block_out_channels=(80, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _unet_rows(boards: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of every training step."""
    for start in range(0, UNET_RECIPE.steps * UNET_RECIPE.batch_size, UNET_RECIPE.batch_size):
        positions = range(start, start + UNET_RECIPE.batch_size)
        chosen = [samples.sample_at(UNET_RECIPE, position, len(boards)) for position in positions]
        rows = samples.make_rows([boards[sample.index] for sample in chosen], chosen, UNET_RECIPE, "unet")
        yield {name: torch.from_numpy(values) for name, values in rows.items()}


def bundle_stage(work: Path, out: Path) -> str:
    """The bundle in float16, calibrated on boards held out of training; returns its model id."""
    config = json.loads((work / "features/config.json").read_text())
    features = load_backbone(work / "features")
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(work / "unet").half(),
        "vae": AutoencoderKL.from_pretrained(work / "vae").half(),
        "features": features.half(),
        "features_config": config,
        "final_features": lite0_features().half(),
        "final_features_config": CONFIG,
        "prompt_cond": torch.zeros(1, 1, 32),
        "prompt_uncond": torch.zeros(1, 1, 32),
        "category": "circuit_board",
        "provenance": {"recipe": FINE_TUNING, "unet_recipe": UNET_RECIPE.model_dump()},
    }
    save_bundle(out, settings=SETTINGS, overwrite=True, **parts)
    held_out = [board_picture(index) for index in HELD_OUT_BOARDS]
    choice = Calibrator(load_bundle(out), start_steps=(250, 350, 450, 550)).calibrate(held_out)
    LOG.info("bundle: %s", choice.settings)
    return update_settings(out, choice.settings, {"good_scores": choice.good_scores})


def _one_thread() -> None:
    """Codec and ViT train side by side, one core each."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)


def main(
    work: Annotated[Path, typer.Option(help="folder for the outputs of the stages")] = Path("small-model-work"),
    out: Annotated[Path, typer.Option(help="bundle to write")] = Path("glad_core/small_bundle"),
) -> None:
    """Train the small model stage by stage."""
    make_pool(work / "pool.npz")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as side_by_side:
        for running in [side_by_side.submit(run, work) for run in (codec_stage, features_stage)]:
            running.result()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(os.cpu_count() or 1)
    unet_stage(work)
    LOG.info("bundle: model id %s", bundle_stage(work, out))
