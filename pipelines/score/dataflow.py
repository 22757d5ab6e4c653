"""The scoring job as one Ray Data chain, top to bottom: list -> decode -> reconstruct -> write."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster import session
from cluster.storage import StorageError
from glad_core.errors import GladError
from pipelines.archive.decode import Reading, fetch_and_decode
from pipelines.archive.listing import TASK_CPUS, read_manifest
from pipelines.models.find import Models
from pipelines.runs.claim import Plan
from pipelines.runs.commits import Written
from pipelines.runs.run import Run
from pipelines.runs.schema import MANIFEST
from pipelines.runs.write import ResultsWriter, new_staging
from pipelines.score.actor import ActorSettings, GladActor
from pipelines.score.actor_plan import ActorPlan
from pipelines.score.batch_sizes import BatchSizes, Images, batch_sizes

if TYPE_CHECKING:
    from ray.data import Dataset

ELSEWHERE = 3  # images from all over the archive that are read to see whether storage works


def run_dataflow(
    run: Run, plan: Plan, done: Collection[int], reading: Reading, actor: ActorSettings, actors: ActorPlan, alone: bool
) -> Generator[Written]:
    """Score the shards that are not ``done``; yields what was written, piece by piece.

    Closing the generator, or an exception, ends the actors. The job has Ray ``alone`` if no cluster address was given.

    Raises:
        GladError, StorageError: from any of its processes.
    """
    if len(done) == plan.shards:
        return
    sides = [settings.resolution for settings in actor.models.settings().values()]
    sizes = batch_sizes(plan, done, actors, Images(max(sides), actor.maps, actor.reconstructions), alone)
    failure: BaseException | None = None
    staged = new_staging(plan.generation)
    try:
        # The dataset is bound to no name in this function: a reference to it would keep its actors alive.
        rows: Any = iter(dataflow(run, plan, staged, reading, actor, actors, sizes, alone).iter_rows())
        with closing(rows):
            for row in rows:
                yield Written.from_row(row)
    except Exception as error:
        failure = session.root_cause(error, GladError, StorageError)
    finally:
        # Ray ends actors and frees their CPUs once nothing refers to them. Reference cycles of its own do so, whether
        # a process of the job failed or the caller stopped.
        gc.collect()
    if failure is not None:
        raise failure


def dataflow(
    run: Run,
    plan: Plan,
    staged: str,
    reading: Reading,
    actor: ActorSettings,
    actors: ActorPlan,
    sizes: BatchSizes,
    alone: bool,
) -> Dataset:
    """The chain. Only a row per piece of a shard reaches the driver, so its memory hardly grows with the archive."""
    import ray.data

    # 1 list: stretches of the manifest that are still to be scored : (first, last + 1) each. No CPU, it is a list.
    stretches = ray.data.from_items(
        [{"first": first, "last": last} for first, last in sizes.stretches], override_num_blocks=sizes.tasks
    )
    options = stretches.context.execution_options
    # In the manifest's order, so that a shard's images come together and are written together.
    options.preserve_order = True
    # A block leaves a task once it is full. (`repartition` would be clearer, but its task needs a whole CPU, and the
    # actors have them.)
    stretches.context.target_max_block_size = sizes.block_bytes
    if sizes.store_bytes is not None:
        options.resource_limits = ray.data.ExecutionResources(object_store_memory=sizes.store_bytes)

    # 2 decode: a stretch of the manifest : rows with pixels or an error (`DECODED_SCHEMA`).
    # On one machine the number of tasks is planned and they ask for no CPU: Ray Data counts whole CPUs of what actors
    # leave, and would decode one at a time on two cores. In a cluster they ask, or they would be placed on a head
    # without CPUs.
    decoded = stretches.map_batches(
        list_and_decode(run, plan, reading, resolution_of(actor.models), sizes.images_per_call),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0 if alone else TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=actors.decoders),
    )

    # 3 reconstruct: decoded rows : results or errors (`SCORED_SCHEMA`). One GPU, or a share of the cores, per actor.
    # Several calls in an actor at a time, so that its engine always has an image for a free slot.
    pool: dict[str, Any] = {"min_size": 1, "initial_size": sizes.actors} if actors.grows else {"size": sizes.actors}
    judged = decoded.map_batches(
        GladActor,
        fn_constructor_args=(actor,),
        compute=ray.data.ActorPoolStrategy(
            **pool,
            max_concurrent_calls_per_actor=sizes.calls,
            max_tasks_in_flight_per_actor=sizes.calls_in_flight,
        ),
        batch_size=sizes.images_per_call,
        batch_format="pyarrow",
        num_cpus=actors.num_cpus,
        num_gpus=actors.num_gpus,
    )

    # 4 write: results and errors : files, and a row for each shard that they belong to (`WRITTEN_SCHEMA`).
    # No CPU: decoding tasks hold theirs to the end, and a write that waits for one would hold up the commits. Actors,
    # since Ray may end a task's process soon after it, and starting one takes seconds of a core.
    return judged.map_batches(
        ResultsWriter,
        fn_constructor_args=(run, plan.rows_per_shard, plan.generation, staged),
        batch_size=plan.rows_per_shard,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=sizes.writers),
        num_cpus=0,
    )


def list_and_decode(
    run: Run, plan: Plan, reading: Reading, resolution: Callable[[str | None], int], rows_per_table: int
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """A stage: stretches of the manifest in, decoded rows out, at most ``rows_per_table`` at a time."""
    manifest = run.path(MANIFEST, plan.listing)

    def elsewhere() -> Iterator[dict[str, Any]]:
        for part in range(ELSEWHERE):
            first = (plan.images - 1) * part // (ELSEWHERE - 1)
            yield from read_manifest(manifest, plan.listed, first, first + 1, run.storage).to_pylist()

    decode = fetch_and_decode(run.storage, resolution, reading, elsewhere)

    def stage(stretches: pa.Table) -> Iterator[pa.Table]:
        for stretch in stretches.to_pylist():
            rows = read_manifest(manifest, plan.listed, stretch["first"], stretch["last"], run.storage)
            for start in range(0, len(rows), rows_per_table):
                yield decode(rows.slice(start, rows_per_table))

    return stage


def resolution_of(models: Models) -> Callable[[str | None], int]:
    """The side, in pixels, to which an image of a category is resized; the largest if no model knows the category."""
    sides = {key: settings.resolution for key, settings in models.settings().items()}
    largest = max(sides.values())
    return lambda category: sides.get(models.key(category) or "", largest)
