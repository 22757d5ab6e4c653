"""The denoising steps that every image of a bundle walks, and where along them an image may stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glad_core import schedule
from glad_core.bundle.settings import Settings


@dataclass(frozen=True)
class Chain:
    """Steps are counted by an index k from 0.

    Args:
        timesteps: t of every step, falling.
        stride: timesteps from one step to the next.
        start: timestep to which the image is noised (Eq. 1).
        comparable: number of steps, from the first, that may be compared; 0 if no image is ever compared.
        floor: index of the first step below min_step, where every image stops; None if there is none.
        delta: δ, the step score above which an image stops.
    """

    timesteps: list[int]
    stride: int
    start: int
    comparable: int
    floor: int | None
    delta: float

    @classmethod
    def of(cls, s: Settings, train_steps: int) -> Chain:
        """The chain of these settings, for a model trained with ``train_steps`` timesteps."""
        last = train_steps - 1
        # The released code compares in float16, δ included.
        delta = float(torch.tensor(s.delta, dtype=torch.float16 if s.variant == "official" else torch.float32))
        stride = s.start_step // s.inference_steps
        if s.profile == "fast":
            only = min(s.start_step, last)
            floor = 0 if only < s.min_step else None
            return cls([only], stride, only, comparable=0, floor=floor, delta=delta)
        timesteps = schedule.timesteps(s.start_step, s.inference_steps)
        floor = next((k for k, t in enumerate(timesteps) if t < s.min_step), None)
        # The search ends with the first step below min_step, which is still compared.
        comparable = len(timesteps) if floor is None else floor + 1
        return cls(
            timesteps,
            stride,
            start=min(s.start_step - (s.noise_index == "T-1"), last),
            comparable=0 if s.delta == 0 else comparable,
            floor=floor,
            delta=delta,
        )
