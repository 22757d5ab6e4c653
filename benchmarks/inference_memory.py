"""Memory that scoring with Stable Diffusion v1-4 and DINO ViT-B/8 needs on the GPU: no GPU, no weights.

    python benchmarks/inference_memory.py [--resolution 512] [--json]
    python benchmarks/inference_memory.py --measure    # one image for real on this CPU, random weights, minutes

The engine's own calls (encode, UNet, comparison, final comparison) run on fake tensors, which have shapes and no data;
PyTorch's MemTracker adds up what is alive. The largest call is the peak: between calls an image in flight keeps some
megabytes of latents. Workspaces of the convolution library and the CUDA context (together about 1 GB) are not counted.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from glad_core import adaptive, schedule, scoring
from glad_core.bundle import Model
from glad_core.detect import Request, final_token_map
from glad_core.engine import Engine
from glad_core.features import create_vit
from glad_core.settings import Settings

GB = 1e9
SLOTS = (1, 2, 4, 8, 16)


def full_size_model(vit: VisionTransformer, resolution: int, autocast: torch.dtype | None) -> Model:
    """The networks of the paper with no weights in them; to be called under FakeTensorMode."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    return Model(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(),
        vae=vae.eval(),
        features=vit,
        final_features=vit,
        prompt_cond=torch.randn(1, 77, 768),
        prompt_uncond=torch.randn(1, 77, 768),
        alphas=schedule.alphas_cumprod(),
        settings=Settings(resolution=resolution, feature_resolution=resolution),
        category="",
        model_id="",
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast=autocast,
    )


def peak(model: Model, call: Callable[[], Any]) -> float:
    """Bytes alive at most during a call, the networks' weights left out."""
    tracker = MemTracker()
    tracker.track_external(model.unet, model.vae, model.features)
    with tracker:
        call()
    snapshot = tracker.get_tracker_snapshot("peak")[model.device]
    return sum(size for kind, size in snapshot.items() if getattr(kind, "value", kind) not in ("Total", "Parameter"))


def calls(model: Model, slots: int) -> dict[str, float]:
    """Peak bytes of each of the engine's calls with ``slots`` images in flight."""
    side = model.settings.resolution
    images = torch.randn(slots, 3, side, side)
    latents = torch.randn(slots, 4, side // 8, side // 8)
    prompts = model.prompt_cond.expand(slots, -1, -1)

    def final() -> Any:
        maps, _ = final_token_map(model, images, adaptive.decode(model, latents))
        return scoring.smooth(scoring.resize_map(maps, side), model.settings.blur_sigma)

    return {
        "encode": peak(model, lambda: adaptive.encode(model, images, latents)),
        "UNet": peak(model, lambda: adaptive.predict_noise(model, latents, torch.ones(slots), prompts)),
        "compare": peak(model, lambda: adaptive.compare(model, latents, latents)),
        "final": peak(model, final),
    }


def measured(resolution: int) -> tuple[float, float]:
    """Bytes by which this process grows for one image in the engine, and the seconds the image takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = full_size_model(create_vit("vit_base_patch8_224.dino"), resolution, None)
    # One step of one image, compared and concluded: more steps would take longer, not more memory.
    model = replace(model, settings=model.settings.model_copy(update={"inference_steps": 1, "min_step": 1000}))
    engine = Engine(model, slots=1)
    engine.submit(Request("image", np.zeros((resolution, resolution, 3), np.uint8)))
    started = time.perf_counter()
    while engine.busy:
        for _, verdict in engine.tick():
            if isinstance(verdict, Exception):
                raise verdict
    seconds = time.perf_counter() - started
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), seconds


def main(
    resolution: Annotated[int, typer.Option(help="Side of the image, pixels")] = 512,
    measure: Annotated[bool, typer.Option("--measure", help="One image for real, instead of the table")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line")] = False,
) -> None:
    """Print the table."""
    if measure:
        grown, seconds = measured(resolution)
        print(json.dumps({"resolution": resolution, "slots": 1, "grown_gb": grown / GB, "seconds": seconds}))
        return
    rows = []
    # The tracker takes only weights that could be trained; of those autocast would keep its casts, which it does not
    # of a bundle's.
    torch.set_autocast_cache_enabled(False)
    # timm computes with values while it builds, so this network is real.
    vit = create_vit("vit_base_patch8_224.dino").requires_grad_(True)
    for name, dtype in (("off", None), ("bf16", torch.bfloat16)):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            model = full_size_model(vit, resolution, dtype)
            networks = (model.unet, model.vae, model.features)
            weights = 4 * sum(parameter.numel() for network in networks for parameter in network.parameters())
            for slots in SLOTS:
                of = {call: size / GB for call, size in calls(model, slots).items()}
                rows.append({"precision": name, "slots": slots, "weights": weights / GB} | of)
    table = Table("precision", "slots", "weights GB", "encode", "UNet", "compare", "final", "in all GB")
    for row in rows:
        sizes = [row[call] for call in ("encode", "UNet", "compare", "final")]
        row["total"] = row["weights"] + max(sizes)
        table.add_row(
            row["precision"], str(row["slots"]), *(f"{size:.2f}" for size in (row["weights"], *sizes, row["total"]))
        )
    if as_json:
        print(json.dumps({"resolution": resolution, "rows": rows}))
    else:
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
