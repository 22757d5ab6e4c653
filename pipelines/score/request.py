"""The request of a `glad score`, and the counts it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glad_core.bundle.settings import Precision, Search
from pipelines.score.actor_plan import ActorWishes

Pages = Literal["all", "first"]  # of a TIFF or an animation; `pipelines.archive.decode.Pages`
Maps = Literal["token", "full"]  # resolution of stored maps: the ViT's tokens, or the full size
Method = Literal["glad", "nearest"]


class TooManyErrors(Exception):
    """More images failed than --max-errors allows; the command ends with exit code 1."""


class NothingNew(Exception):
    """--new found no new images; the command ends with this line and exit code 0."""


@dataclass(frozen=True)
class ScoreRequest:
    """The options of `glad score`; None leaves the choice to the machine. See its --help for each.

    ``batch_size``, ``num_cpus`` and ``num_gpus`` are per actor. ``good`` are the good images of method ``nearest``.
    """

    source: str
    out: str
    model: str
    category: str | None = None
    batch_size: int | None = None
    actors: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    seed: int = 0
    max_errors: int | None = None
    decode_seconds: int = 20  # `pipelines.archive.decoder.SECONDS`; importing it would slow `glad --help` down
    pages: Pages = "all"
    maps: Maps = "token"
    reconstructions: bool = False
    address: str | None = None
    overwrite: bool = False
    method: Method = "glad"
    good: str | None = None
    search: Search | None = None
    precision: Precision = "off"
    compiled: bool = False
    new: bool = False
    notify: str | None = None

    @property
    def wishes(self) -> ActorWishes:
        """The part of the request that is about actors."""
        return ActorWishes(self.actors, self.num_cpus, self.num_gpus, self.batch_size, self.address)


@dataclass(frozen=True)
class Counts:
    """``images`` of the manifest and further ``pages`` of them = ``scored`` + ``errors``.

    ``anomalies`` of the scored, None without a threshold.

    ``duplicates`` were listed more than once and scored once; ``blank`` entries of a list named nothing. Of the scored,
    ``doubtful`` ones differ from what the model was trained for (column ``doubt``). ``left_out`` counts other files and
    entries that are not among the images, by reason.
    """

    images: int
    scored: int
    anomalies: int | None
    errors: int
    duplicates: int
    blank: int = 0
    doubtful: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    pages: int = 0
