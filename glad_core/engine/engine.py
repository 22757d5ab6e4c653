"""The in-flight engine: the answers of `adaptive.reconstruct`, for images that come and go one by one.

Images need different numbers of steps, so a fixed batch would wait for its slowest. As in a server of language models,
a fixed number of slots holds the images in flight, each at its own timestep; every tick

    enter       fills free slots with waiting images: VAE encode, Eq. 1
    walk        one UNet call over all slots, Eq. 2-3
    find stops  compares what `search.next_comparison` asks for, in bulk, and settles the images whose stop is known
    retire      judges images that have reached step 0

An image in search walks the chain on as if it had not stopped, and keeps x_t and ε̂ of every step that might be
compared (small latents); once its stop step is known it goes back to it. The guarded search compares at the end of the
walk, or as soon as the latents' departure from the input's says that δ was passed. ε and the posterior noise come
from the image's own generator, so who its neighbours are changes nothing but rounding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from glad_core import adaptive, schedule
from glad_core.bundle.model import Model
from glad_core.engine.base import Queue, Verdict
from glad_core.engine.networks import fold_upsampling, keep_norms_low, use_onednn
from glad_core.engine.search import Search, expected_crossing, first_crossing, guess_scores, next_comparison, search_of
from glad_core.judge import conclude, prepare
from glad_core.verdict import Detection, Request

CPU_PIXELS = 8 * 128**2  # of images compared or judged in one call on a CPU: fewer are slower, more take memory
T = TypeVar("T")


@dataclass
class _Comparison:
    score: float
    token_map: Tensor
    x0_hat: Tensor
    x0_true: Tensor


@dataclass(eq=False)
class _Slot:
    """An image in flight; ``k`` is its place in the chain, ``kept`` x_t and ε̂ of the steps it may go back to.

    ``departures`` are how far its latents were from the noised input's.
    """

    request: Request
    image: Tensor
    z: Tensor
    eps: Tensor
    prompt: Tensor
    x: Tensor
    searching: bool
    departures: list[float] = field(default_factory=list)
    k: int = 0
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    compared: dict[int, _Comparison] = field(default_factory=dict)
    steps: list[tuple[int, float]] = field(default_factory=list)
    stop_step: int | None = None
    stop_reason: adaptive.StopReason = "none"
    seconds: float = 0.0

    @property
    def scores(self) -> dict[int, float]:
        return {k: comparison.score for k, comparison in self.compared.items()}


class Engine(Queue):
    """``slots`` images of one model in flight: `submit` requests, and `tick` as long as it is `busy`.

    Args:
        model: the bundle, weights final; its networks are accelerated, see `networks`, and on a CPU put
            into channels-last memory.
        slots: images per UNet call.
        seed: of the run; with the image id it fixes the noise.
        search: see `search_of`.
        compiled: run the networks through `torch.compile`. Batches are then padded to powers of two, and every size is
            compiled here, before the first image.

    Raises:
        GladError: as `search_of`.
    """

    def __init__(
        self, model: Model, slots: int, seed: int = 0, search: Search | None = None, compiled: bool = False
    ) -> None:
        super().__init__(model, slots)
        s = model.settings
        self.seed = seed
        self.search = search_of(s, search)
        self.fall, self.guess = (s.score_fall, s.score_guess) if self.search == "guarded" else (None, None)

        last = len(model.alphas) - 1
        self.fast = s.profile == "fast"
        self.ts = [min(s.start_step, last)] if self.fast else schedule.timesteps(s.start_step, s.inference_steps)
        self.stride = s.start_step // s.inference_steps
        self.start = self.ts[0] if self.fast else min(s.start_step - (s.noise_index == "T-1"), last)
        # The search ends with the first step below min_step, which is still compared.
        below = next((k for k, t in enumerate(self.ts) if t < s.min_step), None)
        self.comparable = 0 if s.delta == 0 or self.fast else len(self.ts) if below is None else below + 1
        self.floor = below  # the place where every image stops
        # The released code compares in float16, δ included.
        self.delta = float(torch.tensor(s.delta, dtype=torch.float16 if s.variant == "official" else torch.float32))

        fitting = max(1, CPU_PIXELS // s.resolution**2)
        self.call = min(slots, fitting) if model.device.type == "cpu" else slots
        self.live: list[_Slot] = []
        self.ticks = self.rows = 0  # while images waited, for `occupancy`
        for network in (model.unet, model.vae):
            # cuDNN is a tenth faster without (H200, Stable Diffusion's sizes, bf16 and float32; docs/speed.md).
            if model.device.type == "cpu":
                network.to(memory_format=torch.channels_last)
            elif model.autocast is not None:
                keep_norms_low(network)
            fold_upsampling(network)
        self.compiled = compiled
        if compiled:
            self._compile()
        elif model.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
            for network in (model.unet, model.vae, model.features, model.final_features):
                use_onednn(network)

    @property
    def occupancy(self) -> float:
        """Share of the slots that held an image while others waited."""
        return self.rows / (self.ticks * self.slots) if self.ticks else 1.0

    def in_flight(self) -> list[Request]:
        return [slot.request for slot in self.live] + self.coming

    def drop(self) -> None:
        self.live, self.coming = [], []

    def work(self) -> list[Verdict]:
        """One UNet call for all that is in flight."""
        self.admit()
        if self.coming:
            self._enter()
        if not self.live:
            return []
        if self.waiting:
            self.ticks, self.rows = self.ticks + 1, self.rows + len(self.live)
        started = time.perf_counter()
        self._walk()
        self._find_stops()
        self._share_time(started, self.live)
        return self._retire()

    def _enter(self) -> None:
        """Encode the images admitted and noise them to the start step, Eq. 1."""
        started = time.perf_counter()
        inputs = prepare(self.model, self._fill(self.coming), self.seed)
        z = adaptive.encode(self.model, inputs.images, inputs.posterior_noise)
        x = schedule.add_noise(self.model.alphas, z, inputs.eps, self._steps([self.start] * len(z)))
        new = [
            _Slot(
                request=request,
                image=inputs.images[row],
                z=z[row],
                eps=inputs.eps[row],
                prompt=inputs.prompts[row],
                x=x[row],
                searching=self.comparable > 0,
            )
            for row, request in enumerate(self.coming)
        ]
        self._share_time(started, new)
        self.live, self.coming = self.live + new, []

    def _walk(self) -> None:
        """Eq. 2-3 for every image at its own timestep, as if none of them stopped here."""
        slots = self._fill(self.live)
        x, prompts = torch.stack([slot.x for slot in slots]), torch.stack([slot.prompt for slot in slots])
        t = self._steps([self.ts[slot.k] for slot in slots])
        eps_hat = adaptive.predict_noise(self.model, x, t, prompts)
        x0_hat = schedule.predict_x0(self.model.alphas, x, eps_hat, t)
        following = x0_hat if self.fast else schedule.ddim_step(self.model.alphas, x0_hat, eps_hat, t - self.stride)
        for row, slot in enumerate(self.live):
            if slot.searching:
                slot.kept.append((x[row], eps_hat[row]))
            slot.x = following[row]
            slot.k += 1
        searching = [row for row, slot in enumerate(self.live) if slot.searching]
        if searching:
            z = torch.stack([self.live[row].z for row in searching])
            eps = torch.stack([self.live[row].eps for row in searching])
            departures = _departure(self.model.alphas, x[searching], z, eps, t[searching])
            for row, departure in zip(searching, departures.tolist(), strict=True):
                self.live[row].departures.append(departure)

    def _find_stops(self) -> None:
        """Compare until every image that can know its stop step knows it."""
        due = []
        for slot in self.live:
            if not slot.searching:
                continue
            if self.fall is None or slot.k == self.comparable or self._passed(slot):
                due.append(slot)
        while due:
            asked = []
            for slot in due:
                scores, guessed = slot.scores, self._guessed(slot)
                k = next_comparison(scores, slot.k, self.delta, self.fall, guessed)
                if k is not None:
                    asked.append((slot, k))
                elif (crossing := first_crossing(scores, self.delta)) is not None or slot.k == self.comparable:
                    self._settle(slot, crossing)
            # Guided by what it finds the search asks again; a scan has compared its one new step.
            self._compare(asked)
            due = [slot for slot, _ in asked]

    def _guessed(self, slot: _Slot) -> list[float] | None:
        return None if self.guess is None else guess_scores(slot.departures, self.guess)

    def _passed(self, slot: _Slot) -> bool:
        """Whether the guess has it that the score has passed δ."""
        guessed = self._guessed(slot)
        return guessed is not None and expected_crossing(slot.scores, guessed, self.delta) is not None

    def _compare(self, asked: list[tuple[_Slot, int]]) -> None:
        """Step scores of images at steps they have walked (Sec. 3.3)."""
        alphas = self.model.alphas
        for part in _parts(asked, self.call):
            filled = self._fill(part)
            x, eps_hat, z, eps, prompts = (
                torch.stack(column)
                for column in zip(*((*slot.kept[k], slot.z, slot.eps, slot.prompt) for slot, k in filled), strict=True)
            )
            t = self._steps([self.ts[k] for _, k in filled])
            x_a = schedule.add_noise(alphas, z, eps, t)
            official = self.model.settings.variant == "official"
            eps_a = eps_hat if official else adaptive.predict_noise(self.model, x_a, t, prompts)
            x0_hat = schedule.predict_x0(alphas, x, eps_hat, t)
            x0_true = schedule.predict_x0(alphas, x_a, eps_a, t)
            maps, scores = adaptive.compare(self.model, x0_true, x0_hat)
            for row, ((slot, k), score) in enumerate(zip(part, scores.tolist()[: len(part)], strict=True)):
                slot.compared[k] = _Comparison(score, maps[row], x0_hat[row], x0_true[row])
                slot.steps.append((self.ts[k], score))

    def _settle(self, slot: _Slot, crossing: int | None) -> None:
        """The stop step is known: go back to it and do there what `adaptive.reconstruct` does."""
        s, alphas = self.model.settings, self.model.alphas
        stop = crossing if crossing is not None else self.floor
        if stop is not None:
            found = slot.compared[stop]
            fused = adaptive.fuse(found.token_map[None], found.x0_hat[None], found.x0_true[None])[0]
            if s.variant == "official":
                x0 = fused if crossing is not None and s.saff else found.x0_true
                t = self._steps([self.ts[stop] - self.stride])
                slot.x, slot.k = schedule.ddim_step(alphas, x0[None], slot.kept[stop][1][None], t)[0], stop + 1
            else:
                slot.k = stop if s.saff else max(0, stop - round(s.restart_margin / self.stride))
                clean = fused if s.saff else slot.z
                slot.x = schedule.add_noise(alphas, clean[None], slot.eps[None], self._steps([self.ts[slot.k]]))[0]
            slot.stop_step = self.ts[stop]
            slot.stop_reason = "min_step" if crossing is None else "difference"
        slot.searching = False
        slot.kept, slot.compared = [], {}

    def _retire(self) -> list[Verdict]:
        """Judge the images that have reached step 0."""
        ready = [slot for slot in self.live if slot.k == len(self.ts) and not slot.searching]
        done: list[Verdict] = []
        for part in _parts(ready, self.call):
            started = time.perf_counter()
            columns = zip(*((slot.image, slot.z, slot.x) for slot in self._fill(part)), strict=True)
            judged = conclude(self.model, *(torch.stack(column) for column in columns))
            self._share_time(started, part)
            done += [(slot.request, _detection(slot, *verdict)) for slot, verdict in zip(part, judged, strict=False)]
        self.live = [slot for slot in self.live if slot not in ready]
        return done

    def _steps(self, timesteps: list[int]) -> Tensor:
        return torch.tensor(timesteps, device=self.model.device)

    def _share_time(self, started: float, slots: list[_Slot]) -> None:
        for slot in slots:
            slot.seconds += (time.perf_counter() - started) / len(slots)

    def _fill(self, rows: list[T]) -> list[T]:
        """The rows of a batch; for compiled networks repeated up to a power of two, so that few sizes ever occur."""
        if not self.compiled:
            return rows
        return rows + rows[:1] * ((1 << (len(rows) - 1).bit_length()) - len(rows))

    def _compile(self) -> None:
        model = self.model
        torch._dynamo.config.recompile_limit = 64  # sizes of one function; beyond it torch would fall back in silence
        vits = {id(vit): vit for vit in (model.features, model.final_features)}.values()
        for network in (model.unet, model.vae.encoder, model.vae.decoder, *(b for vit in vits for b in vit.blocks)):
            network.compile(dynamic=False)
        size = 1
        while size < 2 * self.slots:
            self._warm_up(size)
            size *= 2

    @torch.inference_mode()
    def _warm_up(self, size: int) -> None:
        model, s = self.model, self.model.settings
        image = torch.zeros(s.resolution, s.resolution, 3, dtype=torch.uint8).numpy()
        category = next(iter(model.prompts), None)
        inputs = prepare(model, [Request("warm-up", image, category)] * size, self.seed)
        z = adaptive.encode(model, inputs.images, inputs.posterior_noise)
        # Stacked from rows as in flight: strides are part of what is compiled for.
        images, z, prompts = (torch.stack(list(column)) for column in (inputs.images, z, inputs.prompts))
        adaptive.predict_noise(model, z, self._steps([1] * size), prompts)
        if self.comparable:
            adaptive.compare(model, z, z)
        conclude(model, images, z, z)


def _detection(slot: _Slot, score: float, anomaly_map: np.ndarray, rebuilt: np.ndarray) -> Detection:
    return Detection(
        image_id=slot.request.image_id,
        score=score,
        stop_step=slot.stop_step,
        stop_reason=slot.stop_reason,
        steps=slot.steps,
        anomaly_map=anomaly_map,
        reconstruction=rebuilt,
        seconds=slot.seconds,
        departures=slot.departures,
    )


def _departure(alphas: Tensor, x_BCHW: Tensor, z_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """How far x̂_t is from x^a_t, in clean latents and relative to them, over the ten places where it is furthest, [B].

    With the shared noise prediction of the released code it is the distance of the two clean predictions.
    """
    away = schedule.predict_x0(alphas, x_BCHW, eps_BCHW, t_B) - z_BCHW
    relative = (away.square().mean(1) / z_BCHW.square().mean(1)).flatten(1)
    return relative.topk(min(10, relative.shape[1]), dim=1).values.mean(1).sqrt()


def _parts(rows: list[T], size: int) -> list[list[T]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
