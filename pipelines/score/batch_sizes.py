"""How much of an archive each stage of the scoring job takes at a time. Plain arithmetic, without Ray."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from pipelines.archive.listing import PART_ROWS
from pipelines.runs.claim import Plan
from pipelines.score.actor_plan import ActorPlan
from pipelines.score.request import Maps

SHARDS_PER_TASK = 8  # decoded by one task, up to `IMAGES_PER_TASK` images
IMAGES_PER_TASK = 128
MAX_TASKS = 10_000  # decoding tasks; in a huge archive each takes several stretches
MAX_IMAGES_PER_BLOCK = 64
BLOCKS = 400  # that the blocks of a large archive are sized for, since each costs Ray a task
LEAST_STORE = 64 * 2**20  # bytes of Ray's object store for one job
CALLS = 8  # batches at work in an actor at a time
WRITERS = 2  # processes that write results, no more than there are GLAD actors


@dataclass(frozen=True)
class Images:
    """What decides an image's size on its way: the largest resolution R of the models, and what is stored of it."""

    resolution: int
    maps: Maps
    reconstructions: bool

    @property
    def decoded_bytes(self) -> int:
        return self.resolution**2 * 3

    @property
    def judged_bytes(self) -> float:
        """Bytes of a result: float16 maps, at full size or about an eighth of the side, and PNG at its worst."""
        pixels = self.resolution**2
        return pixels * ((2 if self.maps == "full" else 1 / 32) + (3 if self.reconstructions else 0)) + 4096


@dataclass(frozen=True)
class BatchSizes:
    """What each stage takes at a time.

    Attributes:
        stretches: manifest positions (first, last + 1) that are decoded in one go.
        tasks: decoding tasks that the stretches are shared out to.
        actors: GLAD actors at the start.
        images_per_call: images of one call of an actor.
        block_bytes: size of the blocks in which decoded images leave a task.
        calls: calls at work in an actor at a time.
        calls_in_flight: calls that an actor has or that wait for it.
        writers: writing processes.
        store_bytes: limit of Ray's object store for the job; None for Ray's own.
    """

    stretches: list[tuple[int, int]]
    tasks: int
    actors: int
    images_per_call: int
    block_bytes: int
    calls: int
    calls_in_flight: int
    writers: int
    store_bytes: float | None


def batch_sizes(plan: Plan, done: Container[int], actors: ActorPlan, images: Images, alone: bool) -> BatchSizes:
    """Sizes for the shards of ``plan`` that are not ``done``.

    Args:
        alone: the job has Ray for itself, on this machine.
    """
    per_task = min(IMAGES_PER_TASK, SHARDS_PER_TASK * plan.rows_per_shard)
    missing = sum(plan.rows_per_shard for shard in range(plan.shards) if shard not in done)
    # No more actors than batches.
    first = min(actors.actors, -(-missing // actors.slots))
    # A call is at most one batch of the engine. It is less in a small archive, or the actor that is ready first would
    # take all of it. A pool that grows shall leave something for the actors to come.
    per_call = min(actors.slots, -(-missing // (first * (2 * CALLS if actors.grows else CALLS))))
    # A block is one call, so that actors start at once and results arrive steadily; in a large archive several.
    per_block = max(per_call, min(MAX_IMAGES_PER_BLOCK, plan.images // BLOCKS))
    calls = max(2, CALLS * per_call // per_block)
    # A pool grows while every actor has as many calls in flight as it may. Twice as many as are at work, so that images
    # waiting for an actor count as a backlog.
    in_flight = 2 * calls if actors.grows else calls
    stretches = _stretches(plan, done, per_task)
    store_bytes = None
    if alone and actors.decoders is not None:
        rounds = -(-len(stretches) // MAX_TASKS)
        ahead = actors.decoders * per_task * rounds + 2 * first * in_flight * per_block
        store_bytes = _store_bytes(images, plan.rows_per_shard, ahead)
    return BatchSizes(
        stretches=stretches,
        tasks=min(len(stretches), MAX_TASKS),
        actors=first,
        images_per_call=per_call,
        block_bytes=per_block * images.decoded_bytes,
        calls=calls,
        calls_in_flight=in_flight,
        writers=WRITERS if actors.grows else min(WRITERS, first),
        store_bytes=store_bytes,
    )


def _stretches(plan: Plan, done: Container[int], longest: int) -> list[tuple[int, int]]:
    """Missing stretches of the manifest, none across two of its files and none longer than ``longest``."""
    return [
        (start, min(start + longest, end))
        for first, end in plan.stretches(done, PART_ROWS)
        for start in range(first, end, longest)
    ]


def _store_bytes(images: Images, rows_per_shard: int, ahead: int) -> float:
    """Bytes of Ray's object store that a job may take; each of its three stages gets about a third.

    Enough for ``ahead`` decoded images, and for the results of two shards more than writers work on. Without a limit,
    decoding would run on while actors start, slow them down, and fill the store with gigabytes nobody waits for.
    """
    decoded = 3 * ahead * images.decoded_bytes
    judged = 3 * (WRITERS + 2) * rows_per_shard * images.judged_bytes
    return max(LEAST_STORE, decoded, judged)
