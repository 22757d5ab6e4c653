"""`make small-model`: train the bundled CPU model from nothing on two cores.

    pictures ──▶ codec ──┐
        └──────▶ ViT  ───┴──▶ UNet (ATP) ──▶ bundle

Every stage leaves one folder or file in the work folder and is skipped if that exists. Iteration counts are fixed, so a
slower machine takes longer and gets the same model up to rounding.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from pipelines.small_codec import train_codec
from pipelines.small_features import train_features
from pipelines.small_pictures import make_pool


def stage(folder: Path, make: Callable[[Path], object]) -> None:
    """Run ``make`` on a partial folder and move it to ``folder``; nothing to do where ``folder`` exists."""
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


def _one_thread() -> None:
    """Codec and ViT train side by side, one core each."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)


def main(
    work: Annotated[Path, typer.Option(help="folder for what the stages leave")] = Path("small-model-work"),
) -> None:
    """Train the small model stage by stage."""
    make_pool(work / "pool.npz")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as side_by_side:
        for running in [side_by_side.submit(run, work) for run in (codec_stage, features_stage)]:
            running.result()


if __name__ == "__main__":
    typer.run(main)
