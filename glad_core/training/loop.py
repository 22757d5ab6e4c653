"""How a part of a model is trained: the state a run resumes from, and the loop that every worker runs.

All randomness comes with the rows (`samples`), so an interrupted run resumes as if nothing had happened.

Shapes: K categories, L D prompt tokens and their width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glad_core.bundle.model import Model
from glad_core.errors import GladError
from glad_core.training.losses import Report, Rows
from glad_core.training.muon import muon_and_adamw
from glad_core.training.recipe import Recipe
from glad_core.training.samples import derived_seed


@dataclass
class TrainState:
    """All that a resumed run needs: the weights in training, the optimisers, and the number of finished steps."""

    loss: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    ema: EMAModel | None
    step: int = 0

    @classmethod
    def start(cls, loss: Any, recipe: Recipe) -> TrainState:
        """A fresh state around one of the losses.

        Raises:
            GladError: adamw8bit without bitsandbytes.
        """
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        optimizers: Sequence[torch.optim.Optimizer]
        if recipe.optimizer == "muon":
            optimizers = muon_and_adamw(loss, recipe.learning_rate, loss.outer)
        else:
            adamw = torch.optim.AdamW if recipe.optimizer == "adamw" else adamw_8bit()
            optimizers = [adamw(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        ema = EMAModel(trained, decay=recipe.ema_decay, use_ema_warmup=True) if recipe.ema_decay else None
        scaler = torch.amp.GradScaler(trained[0].device.type, enabled=recipe.autocast == "fp16")
        if recipe.gradient_checkpointing:
            for network in loss.children():
                if hasattr(network, "enable_gradient_checkpointing"):
                    network.enable_gradient_checkpointing()
        return cls(loss, optimizers, scaler, ema)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.loss.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]

    def finish(self) -> None:
        """Make the networks ready for inference, with the averaged weights if an average was kept."""
        if self.ema is not None:
            self.ema.copy_to([parameter for parameter in self.loss.parameters() if parameter.requires_grad])
        self.loss.requires_grad_(False).eval()


@dataclass(frozen=True)
class StepResult:
    """One optimiser step as this worker saw it; times in seconds."""

    step: int
    loss: float
    report: Report
    learning_rate: float
    images: int
    seconds: float
    data_seconds: float


def fine_tune(state: TrainState, batches: Iterable[Rows], recipe: Recipe) -> Iterator[StepResult]:
    """Run the steps that are left, yielding after each; the caller logs, saves ``state``, or stops.

    In a process group of several workers, each runs this on its own share of every batch, and gradients are averaged
    (DistributedDataParallel).

    Args:
        batches: this worker's share of every step from ``state.step`` on.

    Raises:
        GladError: the gradient is not a number; the weights are still those of the step before.
    """
    network: nn.Module = state.loss
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        network = DistributedDataParallel(state.loss)
    remaining = iter(batches)
    while state.step < recipe.steps:
        started = time.perf_counter()
        rows = next(remaining)
        waited = time.perf_counter() - started
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor(recipe, state.step)
        loss, report = _accumulate(network, rows, recipe, state.scaler)
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
        trained = [parameter for parameter in state.loss.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        # Loss scaling produces infinities now and then and lowers its scale; at scale 1 they are real.
        scaled = state.scaler.is_enabled() and state.scaler.get_scale() > 1
        if not scaled and not bool(torch.isfinite(norm)):
            raise GladError(
                f"training diverged at step {state.step + 1} (loss {loss:g}): the last good checkpoint is kept; "
                "lower --learning-rate or use --precision bf16"
            )
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.step(trained)
        state.step += 1
        rate = state.optimizers[0].param_groups[0]["lr"]
        yield StepResult(state.step, loss, report, rate, len(rows["index"]), time.perf_counter() - started, waited)


def _accumulate(network: nn.Module, rows: Rows, recipe: Recipe, scaler: torch.amp.GradScaler) -> tuple[float, Report]:
    """Forward and backward over the micro-batches of one step; gradients are exchanged at the last one only."""
    size = len(rows["index"])
    micro = recipe.micro_batch or size
    total = 0.0
    sums: Report = {}
    for start in range(0, size, micro):
        chunk = {name: values[start : start + micro] for name, values in rows.items()}
        last = start + micro >= size
        quiet = network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()
        with quiet:
            loss, report = network(chunk)
            share = len(chunk["index"]) / size
            scaler.scale(loss * share).backward()
        total += loss.item() * share
        sums = add_reports(sums, report)
    return total, sums


def category_prompts(model: Model, categories: Sequence[str]) -> tuple[Tensor, bool]:
    """The prompts of the categories to train, [K, L, D], and whether they are learned.

    A single category has the bundle's constant prompt. For several, the bundle has an embedding of "a photo of sks" and
    each category's name if a text encoder made it; else each starts as noise of its own and is learned with the UNet.
    """
    if all(name in model.prompts for name in categories):
        return torch.cat([model.prompts[name] for name in categories]), False
    if len(categories) == 1:
        return model.prompt_cond, False
    shape = model.prompt_cond.shape[1:]
    seeds = [torch.Generator().manual_seed(derived_seed("prompt", name)) for name in categories]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in seeds])
    return noise.to(model.prompt_cond), True


def add_reports(a: Report, b: Report) -> Report:
    """The sum of two reports."""
    names = [*a, *(name for name in b if name not in a)]
    zero = (0.0, 0.0)
    return {n: (a.get(n, zero)[0] + b.get(n, zero)[0], a.get(n, zero)[1] + b.get(n, zero)[1]) for n in names}


def lr_factor(recipe: Recipe, step: int) -> float:
    """Multiplier of the learning rate at ``step``."""
    if recipe.lr_schedule == "constant":
        return 1.0
    warm_up = max(1, recipe.steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, recipe.steps - warm_up)))


def adamw_8bit() -> Any:
    """bitsandbytes' AdamW with 8-bit moments.

    Raises:
        GladError: it is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise GladError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or use adamw") from error
    return AdamW8bit
