"""What `glad score` is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glad_core.engine.search import Search
from pipelines.models.find import SMALL
from pipelines.score.actor_plan import ActorWishes


class TooManyErrors(Exception):
    """More images failed than --max-errors allows; the command ends with exit code 1."""


@dataclass(frozen=True)
class ScoreRequest:
    """What the user asked for; None where the machine decides. ``num_cpus`` and ``num_gpus`` are per actor.

    ``good`` holds the images that ``nearest`` remembers.
    """

    source: str
    out: str
    model: str = SMALL
    category: str | None = None
    batch_size: int | None = None
    actors: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    seed: int = 0
    max_errors: int | None = None
    maps: Literal["token", "full"] = "token"
    reconstructions: bool = False
    address: str | None = None
    overwrite: bool = False
    method: Literal["glad", "nearest"] = "glad"
    good: str | None = None
    search: Search | None = None
    precision: Literal["off", "bf16", "fp16"] = "off"
    compiled: bool = False

    @property
    def wishes(self) -> ActorWishes:
        """What of the request is about actors."""
        return ActorWishes(self.actors, self.num_cpus, self.num_gpus, self.batch_size, self.address)


@dataclass(frozen=True)
class Counts:
    """``images`` in the manifest = ``scored`` + ``errors``; ``anomalies`` of those scored, None without a threshold."""

    images: int
    scored: int
    anomalies: int | None
    errors: int
    duplicates: int
