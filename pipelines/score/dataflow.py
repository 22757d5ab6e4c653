"""The scoring job as one Ray Data chain, top to bottom: manifest -> fetch + decode -> GLAD -> results and errors."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa

from cluster import session
from cluster.storage import Storage, StorageError, join
from glad_core.errors import GladError
from pipelines.archive.decode import fetch_and_decode
from pipelines.archive.listing import PART_ROWS, TASK_CPUS, read_manifest
from pipelines.runs.commits import Plan, Written
from pipelines.runs.schema import MANIFEST
from pipelines.runs.write import ResultsWriter
from pipelines.score.actor import ActorSettings, GladActor
from pipelines.score.actor_plan import ActorPlan

if TYPE_CHECKING:
    from ray.data import Dataset

SHARDS_PER_TASK = 8  # decoded by one task, up to `IMAGES_PER_TASK` images
IMAGES_PER_TASK = 128
MAX_TASKS = 10_000  # that decode; in a huge archive each does several stretches
MAX_ROWS_PER_BLOCK = 64
LEAST_ROOM = 64 * 2**20  # bytes of Ray's object store for one job
CALLS = 8  # batches at work in an actor at a time
WRITERS = 2  # no more than there are GLAD actors


def run_dataflow(
    storage: Storage, out: str, actor: ActorSettings, room: ActorPlan, plan: Plan, done: set[int], alone: bool
) -> Generator[Written]:
    """What the job writes, piece by piece; closing it, or an exception, ends the actors.

    Raises:
        GladError, StorageError: in any of its processes.
    """
    if len(done) == plan.shards:
        return
    failure: BaseException | None = None
    try:
        # The dataset has no name here: who knows it knows its actors.
        rows: Any = iter(dataflow(storage, out, actor, room, plan, done, alone).iter_rows())
        with closing(rows):
            for row in rows:
                yield Written(**row | {"files": tuple(row["files"])})
    except Exception as error:
        failure = session.root_cause(error, GladError, StorageError)
    if failure is not None:
        # Ray ends actors and frees their CPUs once nothing refers to them any more, and its exceptions do, in cycles.
        gc.collect()
        raise failure


def dataflow(
    storage: Storage, out: str, actor: ActorSettings, room: ActorPlan, plan: Plan, done: set[int], alone: bool
) -> Dataset:
    """The job as one Ray Data chain: manifest -> fetch + decode -> GLAD -> results and errors.

    Shards ``done`` are left out before anything of them is fetched. Only a row for each shard written reaches the
    driver, so its memory hardly grows with the archive. The job has Ray ``alone`` where no address was given.
    """
    import ray.data

    sides = {key: settings.resolution for key, settings in actor.models.settings().items()}
    largest = max(sides.values())
    per_task = min(IMAGES_PER_TASK, SHARDS_PER_TASK * plan.rows_per_shard)
    stretches = [
        (start, min(start + per_task, end))
        for first, end in plan.stretches(done, PART_ROWS)
        for start in range(first, end, per_task)
    ]
    decode = fetch_and_decode(storage, lambda category: sides.get(actor.models.key(category) or "", largest))

    def list_and_decode(stretch: pa.Table) -> Iterator[pa.Table]:
        for place in stretch.to_pylist():
            images = read_manifest(join(out, MANIFEST), plan.listed, place["first"], place["last"], storage)
            for start in range(0, len(images), share):
                yield decode(images.slice(start, share))

    rows = ray.data.from_items(
        [{"first": first, "last": last} for first, last in stretches],
        override_num_blocks=min(len(stretches), MAX_TASKS),
    )
    # In the manifest's order, so that a shard's images come together and are written together.
    rows.context.execution_options.preserve_order = True
    # No more actors than batches.
    left = (plan.shards - len(done)) * plan.rows_per_shard
    first = min(room.actors, -(-left // room.slots))
    actors: dict[str, Any] = {"min_size": 1, "initial_size": first} if room.grows else {"size": first}
    # A block is a call, and leaves as soon as it is full: one batch of pixels, so that actors start at once and results
    # arrive steadily, or less, so that the actor that is ready first does not take all of a small archive; some batches
    # in a large one, since every block costs Ray a task. (`repartition` would say it better, but its task wants a whole
    # CPU that the actors have.)
    share = min(room.slots, -(-left // (first * (2 * CALLS if room.grows else CALLS))))
    rows_per_block = max(share, min(MAX_ROWS_PER_BLOCK, plan.images // 400))
    rows.context.target_max_block_size = rows_per_block * largest * largest * 3
    calls = max(2, CALLS * share // rows_per_block)
    # A pool grows while every actor has all the calls in flight that it may: twice as many as run, so that images
    # waiting for an actor count as a backlog.
    in_flight = 2 * calls if room.grows else calls
    if alone and room.decoders is not None:
        ahead = room.decoders * per_task * -(-len(stretches) // MAX_TASKS) + 2 * first * in_flight * rows_per_block
        rows.context.execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=_room(actor, plan, largest, ahead)
        )
    decoded = rows.map_batches(
        list_and_decode,
        batch_size=1,
        batch_format="pyarrow",
        # On one machine their number is planned and they ask for none: of what actors leave Ray Data counts whole CPUs,
        # and on two cores it would decode one at a time. In a cluster that would place them on a head without CPUs.
        num_cpus=0 if alone else TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=room.decoders),
    )
    judged = decoded.map_batches(
        GladActor,
        fn_constructor_args=(actor,),
        # Several calls in an actor at a time, so that its engine always has an image for a free slot.
        compute=ray.data.ActorPoolStrategy(
            **actors, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=in_flight
        ),
        batch_size=share,
        batch_format="pyarrow",
        num_cpus=room.num_cpus,
        num_gpus=room.num_gpus,
    )
    return judged.map_batches(
        ResultsWriter,
        fn_constructor_args=(storage, out, plan.rows_per_shard, uuid4().hex[:8]),
        batch_size=plan.rows_per_shard,
        batch_format="pyarrow",
        # Actors, because Ray may end the process of a task soon after it, and each new one takes seconds of a core.
        compute=ray.data.ActorPoolStrategy(size=WRITERS if room.grows else min(WRITERS, first)),
        # Decoding tasks hold their CPUs to their end, and a write that waited for them would hold up the commits.
        num_cpus=0,
    )


def _room(actor: ActorSettings, plan: Plan, side: int, ahead: int) -> float:
    """Bytes of Ray's object store that a job may take, of which each of its three stages gets about a third.

    Enough for ``ahead`` decoded images, and for what actors have made of two shards more than writers work on. Without
    a limit decoding runs on while actors start, slows them, and fills the store with gigabytes that nobody waits for.
    """
    pixels = side * side
    made = pixels * ((2 if actor.maps == "full" else 1 / 32) + (3 if actor.reconstructions else 0)) + 4096
    return max(LEAST_ROOM, 3 * ahead * pixels * 3, 3 * (WRITERS + 2) * plan.rows_per_shard * made)
