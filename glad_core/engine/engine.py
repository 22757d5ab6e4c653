"""The in-flight engine: the answers of `adaptive.reconstruct`, for images that enter and leave one by one.

Images need different numbers of steps, so a fixed batch would wait for its slowest image. As in a server of language
models, a fixed number of slots holds the images in flight, each at its own timestep. Every tick

    enter       fills free slots with waiting images: VAE encode, Eq. 1
    walk        makes one UNet call over all slots, Eq. 2-3
    find stops  makes the comparisons that `search.next_comparison` names, and settles images whose stop step is known
    retire      judges images that have reached step 0

An image whose stop step is unknown walks on as if it had not stopped, and keeps x_t and ε̂ of every step that may be
compared (small latents). Once its stop step is known, it goes back to it. The guarded search compares at the end of
the walk, or earlier if the departure of the latents from the input's suggests that δ was exceeded. ε and the posterior
noise come from the image's own generator, so the other images in flight change nothing but rounding.
"""

from __future__ import annotations

import time
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from glad_core import adaptive, schedule
from glad_core.bundle.model import Model
from glad_core.engine.base import Queue, Verdict
from glad_core.engine.chain import Chain
from glad_core.engine.networks import prepare_networks
from glad_core.engine.search import Search, expected_crossing, first_crossing, guess_scores, next_comparison, search_of
from glad_core.engine.slot import Comparison, Slot
from glad_core.judge import conclude, prepare
from glad_core.verdict import Request, finite

CPU_PIXELS = 8 * 128**2  # of the images compared or judged in one call on a CPU: fewer are slower, more need memory
T = TypeVar("T")


class Engine(Queue):
    """``slots`` images of one model in flight: `submit` requests, and `tick` as long as the engine is `busy`.

    Args:
        model: the bundle, with its final weights; its networks are changed in place by `prepare_networks`.
        slots: images per UNet call.
        seed: of the run; with an image's pixels it determines the noise.
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
        self.chain = Chain.of(s, len(model.alphas))
        fitting = max(1, CPU_PIXELS // s.resolution**2)
        self.call = min(slots, fitting) if model.device.type == "cpu" else slots  # images compared or judged in a call
        self.live: list[Slot] = []
        self.ticks = self.rows = 0  # while images waited, for `occupancy`
        self.compiled = compiled
        prepare_networks(model, compiled)
        if compiled:
            self._warm_up()

    @property
    def occupancy(self) -> float:
        """Share of the slots that held an image while others waited."""
        return self.rows / (self.ticks * self.slots) if self.ticks else 1.0

    def in_flight(self) -> list[Request]:
        """Requests of the images in slots, and those about to enter."""
        return [slot.request for slot in self.live] + self.entering

    def drop(self) -> None:
        """Empty the slots."""
        self.live, self.entering = [], []

    def work(self) -> list[Verdict]:
        """One UNet call for all images in flight; returns the images that it finished."""
        self.admit()
        if self.entering:
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
        inputs = prepare(self.model, self._fill(self.entering), self.seed)
        z = adaptive.encode(self.model, inputs.images, inputs.posterior_noise)
        x = schedule.add_noise(self.model.alphas, z, inputs.eps, self._steps([self.chain.start] * len(z)))
        new = [
            Slot(
                request=request,
                image=inputs.images[row],
                z=z[row],
                eps=inputs.eps[row],
                prompt=inputs.prompts[row],
                x=x[row],
                searching=self.chain.comparable > 0,
            )
            for row, request in enumerate(self.entering)
        ]
        self._share_time(started, new)
        self.live, self.entering = self.live + new, []

    def _walk(self) -> None:
        """Eq. 2-3 for every image at its own timestep, as if none of them stopped here."""
        alphas, slots = self.model.alphas, self._fill(self.live)
        x, prompts = torch.stack([slot.x for slot in slots]), torch.stack([slot.prompt for slot in slots])
        t = self._steps([self.chain.timesteps[slot.k] for slot in slots])
        eps_hat = adaptive.predict_noise(self.model, x, t, prompts)
        x0_hat = schedule.predict_x0(alphas, x, eps_hat, t)
        fast = self.model.settings.profile == "fast"
        following = x0_hat if fast else schedule.ddim_step(alphas, x0_hat, eps_hat, t - self.chain.stride)
        for row, slot in enumerate(self.live):
            if slot.searching:
                slot.kept.append((x[row], eps_hat[row]))
            slot.x = following[row]
            slot.k += 1
        searching = [row for row, slot in enumerate(self.live) if slot.searching]
        if searching:
            z = torch.stack([self.live[row].z for row in searching])
            eps = torch.stack([self.live[row].eps for row in searching])
            departures = _departure(alphas, x[searching], z, eps, t[searching])
            for row, departure in zip(searching, departures.tolist(), strict=True):
                self.live[row].departures.append(departure)

    def _find_stops(self) -> None:
        """Compare until no image is left whose stop step could be known and is not."""
        due = [slot for slot in self.live if slot.searching and self._is_due(slot)]
        while due:
            comparisons = []
            for slot in due:
                k = next_comparison(slot.scores, slot.k, self.chain.delta, self.fall, self._guessed(slot))
                if k is not None:
                    comparisons.append((slot, k))
                    continue
                crossing = first_crossing(slot.scores, self.chain.delta)
                if crossing is not None or slot.k == self.chain.comparable:
                    self._settle(slot, crossing)
            self._compare(comparisons)
            # A scan needs no second round; the guarded search chooses its next step by the scores it now has.
            due = [slot for slot, _ in comparisons]

    def _is_due(self, slot: Slot) -> bool:
        """Whether to compare this image now: a scan at every step, the guarded search at the end or on a guess."""
        if self.fall is None or slot.k == self.chain.comparable:
            return True
        guessed = self._guessed(slot)
        return guessed is not None and expected_crossing(slot.scores, guessed, self.chain.delta) is not None

    def _guessed(self, slot: Slot) -> list[float] | None:
        return None if self.guess is None else guess_scores(slot.departures, self.guess)

    def _compare(self, comparisons: list[tuple[Slot, int]]) -> None:
        """Step scores of images at steps they have walked (Sec. 3.3)."""
        alphas = self.model.alphas
        for part in _parts(comparisons, self.call):
            filled = self._fill(part)
            x, eps_hat, z, eps, prompts = (
                torch.stack(column)
                for column in zip(*((*slot.kept[k], slot.z, slot.eps, slot.prompt) for slot, k in filled), strict=True)
            )
            t = self._steps([self.chain.timesteps[k] for _, k in filled])
            x_a = schedule.add_noise(alphas, z, eps, t)
            official = self.model.settings.variant == "official"
            eps_a = eps_hat if official else adaptive.predict_noise(self.model, x_a, t, prompts)
            x0_hat = schedule.predict_x0(alphas, x, eps_hat, t)
            x0_true = schedule.predict_x0(alphas, x_a, eps_a, t)
            maps, scores = adaptive.compare(self.model, x0_true, x0_hat)
            for row, ((slot, k), score) in enumerate(zip(part, scores.tolist()[: len(part)], strict=True)):
                slot.record(k, self.chain.timesteps[k], Comparison(score, maps[row], x0_hat[row], x0_true[row]))

    def _settle(self, slot: Slot, crossing: int | None) -> None:
        """The stop step is known: go back to it and do there what `adaptive.reconstruct` does."""
        s, alphas, chain = self.model.settings, self.model.alphas, self.chain
        stop = crossing if crossing is not None else chain.floor
        if stop is not None:
            at_stop = slot.compared[stop]
            fused = adaptive.fuse(at_stop.token_map[None], at_stop.x0_hat[None], at_stop.x0_true[None])[0]
            if s.variant == "official":
                x0 = fused if crossing is not None and s.saff else at_stop.x0_true
                t = self._steps([chain.timesteps[stop] - chain.stride])
                slot.x, slot.k = schedule.ddim_step(alphas, x0[None], slot.kept[stop][1][None], t)[0], stop + 1
            else:
                slot.k = stop if s.saff else max(0, stop - round(s.restart_margin / chain.stride))
                clean = fused if s.saff else slot.z
                t = self._steps([chain.timesteps[slot.k]])
                slot.x = schedule.add_noise(alphas, clean[None], slot.eps[None], t)[0]
            slot.stop_step = chain.timesteps[stop]
            slot.stop_reason = "min_step" if crossing is None else "difference"
        slot.end_search()

    def _retire(self) -> list[Verdict]:
        """Judge the images that have reached step 0."""
        ready = [slot for slot in self.live if slot.k == len(self.chain.timesteps) and not slot.searching]
        verdicts: list[Verdict] = []
        for part in _parts(ready, self.call):
            started = time.perf_counter()
            columns = zip(*((slot.image, slot.z, slot.x) for slot in self._fill(part)), strict=True)
            conclusions = conclude(self.model, *(torch.stack(column) for column in columns))
            self._share_time(started, part)
            # The padding of `_fill` has no slot.
            for slot, row in zip(part, conclusions, strict=False):
                verdicts.append((slot.request, finite(slot.detection(*row))))
        self.live = [slot for slot in self.live if slot not in ready]
        return verdicts

    def _steps(self, timesteps: list[int]) -> Tensor:
        return torch.tensor(timesteps, device=self.model.device)

    def _share_time(self, started: float, slots: list[Slot]) -> None:
        for slot in slots:
            slot.seconds += (time.perf_counter() - started) / len(slots)

    def _fill(self, rows: list[T]) -> list[T]:
        """The rows of a batch; for compiled networks repeated up to a power of two, so that few sizes ever occur."""
        if not self.compiled:
            return rows
        return rows + rows[:1] * ((1 << (len(rows) - 1).bit_length()) - len(rows))

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Call the networks at every batch size that can occur, so that none is compiled while images wait."""
        model, side = self.model, self.model.settings.resolution
        request = Request("warm-up", np.zeros((side, side, 3), np.uint8), next(iter(model.prompts), None))
        size = 1
        while size < 2 * self.slots:
            inputs = prepare(model, [request] * size, self.seed)
            z = adaptive.encode(model, inputs.images, inputs.posterior_noise)
            # Stacked from rows as in flight: strides are part of what is compiled for.
            images, z, prompts = (torch.stack(list(column)) for column in (inputs.images, z, inputs.prompts))
            adaptive.predict_noise(model, z, self._steps([1] * size), prompts)
            if self.chain.comparable:
                adaptive.compare(model, z, z)
            conclude(model, images, z, z)
            size *= 2


def _departure(alphas: Tensor, x_BCHW: Tensor, z_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """How far x̂_t is from x^a_t, in clean latents and relative to them: mean over the ten furthest positions, [B].

    With the released code's shared noise prediction this is the distance between the two clean predictions.
    """
    away = schedule.predict_x0(alphas, x_BCHW, eps_BCHW, t_B) - z_BCHW
    relative = (away.square().mean(1) / z_BCHW.square().mean(1)).flatten(1)
    return relative.topk(min(10, relative.shape[1]), dim=1).values.mean(1).sqrt()


def _parts(rows: list[T], size: int) -> list[list[T]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
