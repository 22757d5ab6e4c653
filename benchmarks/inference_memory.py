"""Memory and time that scoring with Stable Diffusion v1-4 and DINO ViT-B/8 would take on a GPU: no GPU, no weights.

    python benchmarks/inference_memory.py [--resolution 512] [--json]
    python benchmarks/inference_memory.py --measure    # one image for real on this CPU, random weights, minutes

The engine's own calls (encode, UNet, comparison, final comparison) run on fake tensors, which have shapes and no data;
PyTorch's MemTracker adds up the live tensors. The largest call is the peak; between calls an image in flight keeps some
megabytes of latents. Workspaces of the convolution library and the CUDA context (about 1 GB each) are not counted.

Times are estimates: the multiply-accumulates of the calls, as PyTorch counts them, at the share of a card's peak that
an H200 reached.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from throughput import stable_diffusion
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glad_core import adaptive, scoring
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Settings
from glad_core.engine.engine import Engine
from glad_core.features import create_backbone
from glad_core.judge import final_token_map
from glad_core.verdict import Request

GB = 1e9
SLOTS = (1, 2, 4, 8, 16)
# TFLOP/s of the data sheets, dense: float32 without TF32 (`--precision off`), bfloat16 with float32 sums.
CARDS = {
    "L4": (30.3, 121),
    "A10": (31.2, 125),
    "RTX 4090": (82.6, 165),
    "A100": (19.5, 312),
    "H100 SXM": (67, 989),
}
SHARES = (0.46, 0.25)  # of these that an H200 (67 and 989 as well) reached, see the calls in docs/full-size.md
# A good image at T = 750, S = 25: comparisons of the guarded search (measured, docs/speed.md), and down to min_step.
COMPARISONS = {"guarded": 1.3, "every step": 14}


def peak(model: Model, call: Callable[[], Any]) -> float:
    """Largest number of live bytes during a call, without the networks' weights."""
    tracker = MemTracker()
    tracker.track_external(model.unet, model.vae, model.features)
    with tracker:
        call()
    snapshot = tracker.get_tracker_snapshot("peak")[model.device]
    return sum(size for kind, size in snapshot.items() if getattr(kind, "value", kind) not in ("Total", "Parameter"))


def calls(model: Model, slots: int) -> dict[str, Callable[[], Any]]:
    """The engine's calls with ``slots`` images in flight."""
    side = model.settings.resolution
    images = torch.randn(slots, 3, side, side)
    latents = torch.randn(slots, 4, side // 8, side // 8)
    prompts = model.prompt_cond.expand(slots, -1, -1)

    def final() -> Any:
        maps, _ = final_token_map(model, images, adaptive.decode(model, latents))
        return scoring.smooth(scoring.resize_map(maps, side), model.settings.blur_sigma)

    return {
        "encode": lambda: adaptive.encode(model, images, latents),
        "UNet": lambda: adaptive.predict_noise(model, latents, torch.ones(slots), prompts),
        "compare": lambda: adaptive.compare(model, latents, latents),
        "final": final,
    }


def macs(call: Callable[[], Any]) -> float:
    """Multiply-accumulates of a call, with plain attention, since PyTorch counts no fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def measured(resolution: int) -> tuple[float, float]:
    """Growth of this process in bytes by one image in the engine, and the seconds the image takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # One step of one image, compared and concluded: more steps would take longer, not more memory.
    settings = Settings(resolution=resolution, feature_resolution=resolution, inference_steps=1, min_step=1000)
    model = stable_diffusion(create_backbone("vit_base_patch8_224.dino"), settings, torch.device("cpu"), None)
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
    # The tracker counts only weights that require gradients. Autocast would cache casts of those, which it
    # never does for a bundle's weights.
    torch.set_autocast_cache_enabled(False)
    # timm computes with values while it builds a network, so this one is no fake tensor.
    vit = create_backbone("vit_base_patch8_224.dino").requires_grad_(True)
    rows, work = [], {}
    for name, dtype in (("off", None), ("bf16", torch.bfloat16)):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            settings = Settings(resolution=resolution, feature_resolution=resolution)
            model = stable_diffusion(vit, settings, torch.device("cpu"), dtype)
            networks = (model.unet, model.vae, model.features)
            weights = 4 * sum(parameter.numel() for network in networks for parameter in network.parameters())
            work = {call: macs(run) for call, run in calls(model, 1).items()}
            for slots in SLOTS:
                peaks = {call: peak(model, run) / GB for call, run in calls(model, slots).items()}
                total = weights / GB + max(peaks.values())
                rows.append({"precision": name, "slots": slots, "weights": weights / GB} | peaks | {"total": total})
    seconds = estimated(work)
    if as_json:
        macs_T = {call: count / 1e12 for call, count in work.items()}
        print(json.dumps({"resolution": resolution, "rows": rows, "macs_T": macs_T, "estimated_seconds": seconds}))
        return
    console = Console(width=120)
    table = Table("precision", "slots", *(f"{part} GB" for part in ("weights", *work, "in all")))
    for row in rows:
        sizes = [f"{row[part]:.2f}" for part in ("weights", *work, "total")]
        table.add_row(str(row["precision"]), str(row["slots"]), *sizes)
    console.print(table)
    console.print("T MAC an image:", ", ".join(f"{call} {count / 1e12:.2f}" for call, count in work.items()))
    table = Table("card", "precision", *(f"{search}, s an image" for search in COMPARISONS), title="estimated")
    for row in seconds:
        table.add_row(row["card"], row["precision"], *(f"{row[search]:.2f}" for search in COMPARISONS))
    console.print(table)


def estimated(work: dict[str, float]) -> list[dict[str, Any]]:
    """Seconds an image by card, precision and search."""
    steps = Settings().inference_steps
    rows = []
    for card, peaks in CARDS.items():
        for precision, tflops, share in zip(("off", "bf16"), peaks, SHARES, strict=True):
            row: dict[str, Any] = {"card": card, "precision": precision}
            for search, comparisons in COMPARISONS.items():
                total = work["encode"] + steps * work["UNet"] + comparisons * work["compare"] + work["final"]
                row[search] = 2 * total / (share * tflops * 1e12)
            rows.append(row)
    return rows


if __name__ == "__main__":
    typer.run(main)
