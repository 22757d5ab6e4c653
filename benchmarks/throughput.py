"""How fast: the engine against the published loop, on the same images and weights, in one run.

    python benchmarks/throughput.py [--json] [--bundle BUNDLE] [--size sd --resolution 64] [--device cuda]

untuned    the baseline before the C library keeps buffers
baseline   the released code's loop written plainly: a fixed batch, all of it compared at every step until its last
           image has stopped; networks as loaded, buffers kept as in the engine's actors
scan       the engine, every step compared
guarded    the engine, only those steps compared that could be the first to exceed δ
fast       the engine, one UNet call instead of steps

A machine's speed drifts by a tenth within a minute. Therefore all but the first method take turns, always a step of the
one that is furthest behind; so do the bare network calls that the engine is compared with. Network calls are counted
and timed one by one; FLOPs are torch's count for one row of each call. The images are the demo's 60 test boards (20
good, 40 with defects) in random order; the FLOPs of an archive are those of 99 good boards and one with a defect.
"""

import copy
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from demo_figures import test_set
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glad_core import adaptive, schedule
from glad_core.bundle.model import AUTOCAST, Model, load_bundle
from glad_core.bundle.settings import Settings
from glad_core.engine.engine import Engine
from glad_core.engine.process import keep_buffers, set_up
from glad_core.features import Backbone, create_backbone
from glad_core.image_metrics import image_metrics
from glad_core.images import resize
from glad_core.judge import conclude, prepare
from glad_core.verdict import Request
from pipelines.demo.boards import board_rng, make_board
from pipelines.models.find import SMALL_BUNDLE
from pipelines.score.actor_plan import CPU_SLOTS, GPU_SLOTS

BATCHES = (1, 2, 4, 8, 16)  # tried for the best bare model calls
Found = dict[str, tuple[int | None, float]]  # stop step and score by image
PARTS = {"unet": "UNet", "encode": "VAE", "decode": "VAE", "steps": "DINO", "final": "DINO"}


def published_loop(model: Model, requests: Sequence[Request], batch: int, found: Found) -> Iterator[float]:
    """Stop step and score of every image, by the released code's loop; yields the share finished after every step."""
    s, alphas = model.settings, model.alphas
    steps = schedule.timesteps(s.start_step, s.inference_steps)
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        inputs = prepare(model, part, seed=0)
        z = adaptive.encode(model, inputs.images, inputs.posterior_noise)
        stride = s.start_step // s.inference_steps
        first = min(s.start_step if s.noise_index == "T" else s.start_step - 1, len(alphas) - 1)
        x = schedule.add_noise(alphas, z, inputs.eps, torch.full((len(part),), first, device=model.device))
        running = torch.full((len(part),), s.delta > 0, device=model.device)
        stop_step: list[int | None] = [None] * len(part)
        for done, step in enumerate(steps):
            t = torch.full((len(part),), step, device=model.device)
            eps_hat = adaptive.predict_noise(model, x, t, inputs.prompts)
            x0 = schedule.predict_x0(alphas, x, eps_hat, t)
            if running.any():
                x_a = schedule.add_noise(alphas, z, inputs.eps, t)
                x0_true = schedule.predict_x0(alphas, x_a, eps_hat, t)
                maps, scores = adaptive.compare(model, x0_true, x0)
                differs = scores > torch.tensor(s.delta, dtype=scores.dtype, device=model.device)
                stops = running & (differs | (step < s.min_step))
                fused = torch.where(differs.view(-1, 1, 1, 1), adaptive.fuse(maps, x0, x0_true), x0_true)
                x0 = torch.where(stops.view(-1, 1, 1, 1), fused, x0)
                for row in stops.nonzero()[:, 0].tolist():
                    stop_step[row] = step
                running &= ~stops
            x = schedule.ddim_step(alphas, x0, eps_hat, t - stride)
            yield (start + len(part) * done / len(steps)) / len(requests)
        verdicts = conclude(model, inputs.images, z, x)
        found |= {request.image_id: (stop_step[row], verdicts[row][0]) for row, request in enumerate(part)}


def engine_run(engine: Engine, requests: Sequence[Request], found: Found) -> Iterator[float]:
    """The same by the engine; yields the share finished after every tick."""
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for request, verdict in engine.tick():
            if isinstance(verdict, Exception):
                raise verdict
            found[request.image_id] = (verdict.stop_step, verdict.score)
        walked = sum(slot.k / len(engine.chain.timesteps) for slot in engine.live)
        yield (len(found) + walked) / len(requests)


def network_calls(model: Model) -> dict[str, Callable[[int], Any]]:
    """The network calls that all methods consist of; each takes its number of rows."""
    s, vae = model.settings, model.vae
    side = s.resolution // model.vae_factor

    def latents(rows: int) -> torch.Tensor:
        return torch.randn(rows, vae.config.latent_channels, side, side, device=model.device)

    def images(rows: int, size: int) -> torch.Tensor:
        return torch.rand(rows, 3, size, size, device=model.device)

    def unet(rows: int) -> Any:
        t = torch.full((rows,), 100, device=model.device)
        return model.unet(latents(rows), t, encoder_hidden_states=model.prompt_cond.expand(rows, -1, -1))

    calls = {
        "unet": unet,
        "encode": lambda rows: vae.encode(images(rows, s.resolution)),
        "decode": lambda rows: vae.decode(latents(rows)),
        "steps": lambda rows: model.features(images(rows, s.resolution), last=True),
        "final": lambda rows: model.final_features(images(rows, s.feature_resolution)),
    }
    return {name: model.precision()(call) for name, call in calls.items()}


@dataclass
class Spent:
    """Total seconds, and rows and seconds of every network call."""

    total: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def clock(model: Model) -> float:
    """The time in seconds, once the device has finished all calls so far."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def measured(model: Model, spent: Spent) -> Iterator[None]:
    """Record the time and the network calls of the block in ``spent``."""

    def watched(name: Callable[[Mapping[str, Any]], str], call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = clock(model)
            result = call(*args, **kwargs)
            spent.seconds[name(kwargs)] += clock(model) - started
            spent.rows[name(kwargs)] += len(args[0])
            return result

        return wrapper

    model.unet.forward = watched(lambda _: "unet", model.unet.forward)
    model.vae.encode = watched(lambda _: "encode", model.vae.encode)
    model.vae.decode = watched(lambda _: "decode", model.vae.decode)
    backbones = {id(backbone): backbone for backbone in (model.features, model.final_features)}.values()
    for backbone in backbones:
        backbone.forward = watched(lambda kwargs: "steps" if "last" in kwargs else "final", backbone.forward)
    started = clock(model)
    try:
        yield
    finally:
        spent.total += clock(model) - started
        forwards = [(network, "forward") for network in (model.unet, *backbones)]
        for network, method in (*forwards, (model.vae, "encode"), (model.vae, "decode")):
            delattr(network, method)  # back to the class's own


def take_turns(methods: Mapping[str, tuple[Model, Iterator[float]]]) -> dict[str, Spent]:
    """Run all methods to their end, always a step of the one that has finished the smallest share."""
    spent = {name: Spent() for name in methods}
    share = dict.fromkeys(methods, 0.0)
    while share:
        name = min(share, key=lambda name: share[name])
        model, steps = methods[name]
        with measured(model, spent[name]):
            step = next(steps, None)
        if step is None:
            del share[name]
        else:
            share[name] = step
    return spent


def flops_per_row(model: Model) -> dict[str, int]:
    """FLOPs of one row of every network call."""
    counted = {}
    for name, call in network_calls(model).items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(1)
        counted[name] = counter.get_total_flops()
    return counted


def seconds_per_row(model: Model, call: Callable[[int], Any], batch: int, repeats: int) -> float:
    """Mean seconds of one row of a network call; the mean, since it is compared with a sum over many calls."""
    call(batch)
    started = clock(model)
    for _ in range(repeats):
        call(batch)
    return (clock(model) - started) / (batch * repeats)


def best_batches(model: Model, largest: int) -> dict[str, int]:
    """The batch size, up to ``largest``, at which a row of every network call takes least time."""
    sizes = [batch for batch in BATCHES if batch <= largest]
    best = {}
    for name, call in network_calls(model).items():
        # Three rounds over all sizes, so that a machine that is slow for a moment does not decide.
        rounds = [[seconds_per_row(model, call, batch, 5) for batch in sizes] for _ in range(3)]
        best[name] = min(zip(map(min, *rounds), sizes, strict=True))[1]
    return best


def bare_calls(model: Model, batches: Mapping[str, int]) -> Iterator[float]:
    """Every network call at its best batch size and nothing else; yields the share finished after a round."""
    calls, rounds = network_calls(model), 40
    for done in range(rounds):
        for name, batch in batches.items():
            calls[name](batch)
        yield done / rounds


def stable_diffusion(vit: Backbone, settings: Settings, device: torch.device, autocast: torch.dtype | None) -> Model:
    """Networks of the size of Stable Diffusion v1-4, random weights: good for times and memory, not for scores."""
    torch.manual_seed(0)
    with device:
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        prompts = torch.randn(2, 1, 77, 768)
    return Model(
        unet=unet.eval(),
        vae=vae.eval(),
        features=vit,
        final_features=vit,
        prompt_cond=prompts[0],
        prompt_uncond=prompts[1],
        alphas=schedule.alphas_cumprod().to(device),
        settings=settings,
        category="",
        model_id="",
        device=device,
        dtype=torch.float32,
        autocast=autocast,
    )


def boards(resolution: int, kinds: Sequence[str | None]) -> list[Request]:
    """Boards that no model was trained on, one per kind of defect given; None is a good one."""
    return [
        Request(f"{index}", resize(make_board(board_rng(2, kind or "good", index), kind)[0], resolution))
        for index, kind in enumerate(kinds)
    ]


@torch.inference_mode()
def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    bundle: Annotated[Path, typer.Option(help="model to measure")] = SMALL_BUNDLE,
    size: Annotated[str, typer.Option(help="small: --bundle; sd: Stable Diffusion sizes, random weights")] = "small",
    resolution: Annotated[int, typer.Option(help="side of the images with --size sd, pixels")] = 64,
    images: Annotated[int, typer.Option(help="test boards, at most 60")] = 60,
    batch: Annotated[int, typer.Option(help="images per batch of the baseline")] = 8,
    slots: Annotated[int | None, typer.Option(help="images in flight; 16 on a CPU, 8 on a GPU by default")] = None,
    fast_step: Annotated[int, typer.Option(help="start step T of the fast profile")] = 150,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where the networks run")] = "cpu",
    precision: Annotated[Literal["off", "bf16", "fp16"], typer.Option(help="of all network calls")] = "off",
) -> None:
    """Measure and print."""
    set_up(gpu=True, threads=threads)  # so that a CPU's buffers are kept only after `untuned`
    random.seed(0)
    if size == "small":
        plain = load_bundle(bundle, device, autocast=AUTOCAST[precision])
    else:
        vit = create_backbone("vit_base_patch8_224.dino").to(device)
        settings = Settings(resolution=resolution, feature_resolution=resolution, delta=1e3, score_fall=0.0)
        plain = stable_diffusion(vit, settings, torch.device(device), AUTOCAST[precision])
        for network in (plain.unet, plain.vae):
            network.requires_grad_(False)  # as a bundle's
    slots = slots or (CPU_SLOTS if device == "cpu" else GPU_SLOTS)
    model = copy.deepcopy(plain)  # the engine changes its networks' memory layout, the baseline keeps what was loaded
    s = model.settings
    fast = {"profile": "fast", "start_step": fast_step, "inference_steps": 1, "delta": 0.0, "score_fall": None}
    requests, labels, _ = test_set(s.resolution)
    order = random.sample(range(len(requests)), images)
    requests, labels = [requests[index] for index in order], labels[order]

    found: dict[str, Found] = defaultdict(dict)

    def method(name: str, requests: Sequence[Request], found: Found) -> tuple[Model, Iterator[float]]:
        if name in engines:
            return engines[name].model, engine_run(engines[name], requests, found)
        return plain, published_loop(plain, requests, batch, found)

    engines: dict[str, Engine] = {}
    take_turns({"warm-up": method("untuned", requests[:2], {})})
    spent = take_turns({"untuned": method("untuned", requests, found["untuned"])})
    keep_buffers()  # from here on
    engines = {
        "scan": Engine(model, slots, search="scan"),
        "guarded": Engine(model, slots, search="guarded"),
        "fast": Engine(replace(model, settings=s.model_copy(update=fast)), slots),
    }
    for name in engines:
        take_turns({"warm-up": method(name, requests[:2], {})})
    best = best_batches(model, slots)
    spent |= take_turns(
        {name: method(name, requests, found[name]) for name in ("baseline", *engines)}
        | {"bare": (model, bare_calls(model, best))}
    )
    bare = spent.pop("bare")
    flops = {id(used): flops_per_row(used) for used in (plain, model)}  # the engine's networks need fewer

    figures: dict[str, Any] = {"images": images, "model": bundle.name if size == "small" else f"sd {resolution}"}
    figures |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "precision": precision}
    results: dict[str, dict[str, Any]] = {}
    for name, used in spent.items():
        flops_of = flops[id(model if name in engines else plain)]
        bare_seconds = sum(used.rows[call] * bare.seconds[call] / bare.rows[call] for call in PARTS)
        results[name] = {
            "images_per_s": images / used.total,
            "calls_per_image": {call: used.rows[call] / images for call in PARTS},
            "gflop_per_image": sum(used.rows[call] * flops_of[call] for call in PARTS) / images / 1e9,
            "share": {
                part: sum(used.seconds[call] for call in PARTS if PARTS[call] == part) / used.total
                for part in ("UNet", "VAE", "DINO")
            },
            "over_models": used.total / bare_seconds if name in engines else None,
            "i_auroc": image_metrics(np.array([found[name][r.image_id][1] for r in requests]), labels)["AUROC"],
        }

    baseline = results["baseline"]
    stops = {image: stop for image, (stop, _) in found["baseline"].items()}
    triggered = [image for image, stop in stops.items() if stop is not None and stop >= s.min_step]
    guarded = {image: stop for image, (stop, _) in found["guarded"].items()}
    figures["speedup_scan"] = results["scan"]["images_per_s"] / baseline["images_per_s"]
    figures["speedup_exact"] = results["guarded"]["images_per_s"] / baseline["images_per_s"]
    figures["speedup_fast"] = results["fast"]["images_per_s"] / baseline["images_per_s"]
    figures["scan_agreement"] = np.mean([found["scan"][i][0] == stop for i, stop in stops.items()]).item()
    figures["stop_step_agreement"] = np.mean([guarded[image] == stop for image, stop in stops.items()]).item()
    figures["stop_step_agreement_triggered"] = (
        np.mean([guarded[image] == stops[image] for image in triggered]).item() if triggered else None
    )
    figures["triggered"] = len(triggered)
    figures["slot_occupancy"] = min(engines[name].occupancy for name in ("scan", "guarded"))
    figures["engine_over_models"] = max(results[name]["over_models"] for name in ("scan", "guarded"))
    figures["flops_ratio_mixed"] = results["guarded"]["gflop_per_image"] / baseline["gflop_per_image"]
    archive = boards(s.resolution, ["scratch"] + [None] * (99 if size == "small" else batch - 1))
    spent = take_turns({name: method(name, archive, {}) for name in ("baseline", "guarded")})
    figures["flops_ratio_exact"] = sum(spent["guarded"].rows[call] * flops[id(model)][call] for call in PARTS) / sum(
        spent["baseline"].rows[call] * flops[id(plain)][call] for call in PARTS
    )
    for name, result in results.items():
        figures |= {f"{name}_{key}": value for key, value in result.items()}

    table = Table("", "images/s", "ratio", "UNet", "decodes", "DINO", "GFLOP", "UNet/VAE/DINO time", "I-AUROC")
    for name, result in results.items():
        calls, share = result["calls_per_image"], result["share"]
        table.add_row(
            name,
            f"{result['images_per_s']:.2f}",
            f"{result['images_per_s'] / baseline['images_per_s']:.2f}",
            f"{calls['unet']:.1f}",
            f"{calls['decode']:.1f}",
            f"{calls['steps'] + calls['final']:.1f}",
            f"{result['gflop_per_image']:.1f}",
            "/".join(f"{share[part]:.0%}" for part in ("UNet", "VAE", "DINO")),
            f"{result['i_auroc']:.3f}",
        )
    Console(stderr=as_json, width=120).print(table)
    if as_json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            if isinstance(value, int | float):
                print(f"{name:32} {value:.4g}")


if __name__ == "__main__":
    typer.run(main)
