"""How much of an archive each stage of the scoring job takes at a time. Plain arithmetic, without Ray.

A shard of the manifest goes through the job whole: one block of decoded images, one call of an actor, one write.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from glad_core.bundle.settings import Settings
from pipelines.archive.manifest import PART_ROWS
from pipelines.runs.claim import SHARDS, Plan
from pipelines.score.actor_plan import ActorPlan
from pipelines.score.request import Maps

SHARD_BYTES = 64 * 2**20  # of the decoded images of a shard
SHARDS_PER_ACTOR = 25  # so that the last shards of a job keep all actors busy
MAX_TASKS = 10_000  # decoding tasks; in a huge archive each takes several shards
LEAST_STORE = 64 * 2**20  # bytes of Ray's object store for one job
LEAST_CALLS = 2  # at work in an actor at a time: while one ends, the next fills the slots
ACTORS_PER_WRITER = 8
FULL_BLOCK = 0.75  # of the bytes of a shard: a block of that size leaves a task, and is not cut


@dataclass(frozen=True)
class Images:
    """What decides an image's size on its way: the pixels of its frames (`usual_pixels`), and what is stored of it."""

    pixels: int
    maps: Maps
    reconstructions: bool

    @property
    def decoded_bytes(self) -> int:
        return self.pixels * 3

    @property
    def judged_bytes(self) -> float:
        """Bytes of a result: float16 maps, at full size or about an eighth of the side, and PNG at its worst."""
        return self.pixels * ((2 if self.maps == "full" else 1 / 32) + (3 if self.reconstructions else 0)) + 4096


@dataclass(frozen=True)
class BatchSizes:
    """What each stage takes at a time.

    Attributes:
        shards: that are missing, of at most ``rows`` images.
        tasks: decoding tasks that the shards are shared out to.
        actors: GLAD actors at the start.
        block_bytes: size at which decoded images leave a task.
        calls: calls at work in an actor at a time.
        calls_in_flight: calls that an actor has or that wait for it.
        writers: writing processes at most.
        store_bytes: limit of Ray's object store for the job; None for Ray's own.
    """

    shards: list[int]
    rows: int
    tasks: int
    actors: int
    block_bytes: int
    calls: int
    calls_in_flight: int
    writers: int
    store_bytes: float | None


def usual_pixels(models: Iterable[Settings]) -> int:
    """Pixels of the frames of a picture of the usual size, in the bundle where they are most."""

    def pixels(settings: Settings) -> int:
        size = settings.picture_size or (settings.resolution,) * 2
        return sum(height * width for height, width in (framing.size(*size) for framing in settings.framings()))

    return max(map(pixels, models))


def rows_and_shards(pixels: int, actors: ActorPlan) -> tuple[int, int]:
    """The most images of a shard, a power of two, and the shards that an archive should at least be cut into."""
    fitting = max(1, min(PART_ROWS, SHARD_BYTES // (pixels * 3)))
    return 1 << (fitting.bit_length() - 1), max(SHARDS, SHARDS_PER_ACTOR * actors.most)


def batch_sizes(plan: Plan, done: Container[int], actors: ActorPlan, images: Images, alone: bool) -> BatchSizes:
    """Sizes for the shards of ``plan`` that are not ``done``.

    Args:
        alone: the job has Ray for itself, on this machine.
    """
    shards = plan.missing(done)
    rows = max(plan.place_of(shard)[0].rows_per_shard for shard in shards)
    first = min(actors.actors, len(shards))  # no more actors than shards
    # Small shards in small archives: several are needed to fill the slots of an actor; but each actor gets its part.
    share = -(-len(shards) // first)
    calls = max(LEAST_CALLS, min(share, -(-3 * actors.slots // rows)))
    # A pool grows while every actor has as many calls in flight as it may. Twice as many as are at work, so that shards
    # waiting for an actor count as a backlog.
    in_flight = 2 * calls if actors.grows else calls
    store_bytes = None
    if alone:
        store_bytes = _store_bytes(images, rows, actors.decoders + 2 * first * in_flight)
    return BatchSizes(
        shards=shards,
        rows=rows,
        tasks=min(len(shards), MAX_TASKS),
        actors=first,
        block_bytes=int(FULL_BLOCK * rows * images.decoded_bytes),
        calls=calls,
        calls_in_flight=in_flight,
        writers=-(-actors.most // ACTORS_PER_WRITER),
        store_bytes=store_bytes,
    )


def _store_bytes(images: Images, rows_per_shard: int, ahead: int) -> float:
    """Bytes of Ray's object store that a job may take; each of its three stages gets about a third.

    Enough for ``ahead`` decoded shards, and for the results of four. Without a limit, decoding would run on while
    actors start, slow them down, and fill the store with gigabytes nobody waits for.
    """
    decoded = 3 * ahead * rows_per_shard * images.decoded_bytes
    judged = 3 * 4 * rows_per_shard * images.judged_bytes
    return max(LEAST_STORE, decoded, judged)
