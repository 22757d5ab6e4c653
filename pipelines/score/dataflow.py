"""The scoring job as one Ray Data chain, top to bottom: list -> decode -> reconstruct -> write."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa

from cluster import session
from cluster.storage import StorageError
from glad_core.errors import GladError
from glad_core.views import Framing
from pipelines.archive.decode import Reading, fetch_and_decode
from pipelines.archive.listing import TASK_CPUS
from pipelines.archive.manifest import read_manifest
from pipelines.models.find import Models
from pipelines.runs.claim import MOST_ROWS, Plan
from pipelines.runs.commits import Written
from pipelines.runs.run import Run
from pipelines.runs.schema import MANIFEST
from pipelines.runs.write import ResultsWriter, new_staging
from pipelines.score.actor import ActorSettings, GladActor
from pipelines.score.actor_plan import ActorPlan
from pipelines.score.batch_sizes import BatchSizes, Images, batch_sizes, usual_pixels
from pipelines.score.faults import step_aside

if TYPE_CHECKING:
    from ray.data import Dataset

TASK_MEMORY = 2**29  # bytes that a decoding task or a writer asks for, in a cluster: a shard, and what it is made from
ELSEWHERE = 3  # images from all over the archive that are read to see whether storage works


def run_dataflow(
    run: Run, plan: Plan, done: Collection[int], reading: Reading, actor: ActorSettings, actors: ActorPlan
) -> Generator[Written]:
    """Score the shards that are not ``done``; yields what was written, piece by piece, in any order.

    Closing the generator, or an exception, ends the actors.

    Raises:
        GladError, StorageError: from any of its processes.
    """
    if len(done) == plan.shards:
        return
    images = Images(usual_pixels(actor.models.settings().values()), actor.maps, actor.reconstructions)
    sizes = batch_sizes(plan, done, actors, images, actor.alone)
    failure: BaseException | None = None
    staged = new_staging(plan.generation)
    try:
        # The dataset is bound to no name in this function: a reference to it would keep its actors alive.
        rows: Any = iter(dataflow(run, plan, staged, reading, actor, actors, sizes).iter_rows())
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
) -> Dataset:
    """The chain. A shard goes through it as one block, whichever is ready first: order would have all wait for one.

    Only a row per piece of a shard reaches the driver, so its memory hardly grows with the archive.
    """
    import ray.data

    # 1 list: shards of the manifest that are still to be scored. No CPU, it is a list.
    shards = _missing_shards(sizes)
    # A cluster's head has no memory to give, so that its tasks run elsewhere. One machine gives whatever it has.
    memory = None if actor.alone else TASK_MEMORY

    # 2 decode: a shard of the manifest : rows with pixels or an error (`DECODED_SCHEMA`).
    # On one machine the number of tasks is planned and they ask for no CPU: Ray Data counts whole CPUs of what actors
    # leave, and would decode one at a time on two cores. In a cluster they ask, or they would be placed on a head
    # without CPUs.
    decoded = shards.map_batches(
        list_and_decode(run, plan, reading, actor),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0 if actor.alone else TASK_CPUS,
        memory=memory,
        compute=ray.data.TaskPoolStrategy(size=actors.decoders),
    )

    # 3 reconstruct: decoded rows : results or errors (`SCORED_SCHEMA`). One GPU, or a share of the cores, per actor.
    # Several calls in an actor at a time, so that its engine always has an image for a free slot. As many actors as
    # there is room for, more when machines come. If one dies, Ray starts it anew wherever there is room and repeats its
    # calls; nobody waits for them meanwhile.
    pool: dict[str, Any] = {"min_size": sizes.actors} if actors.grows else {"size": sizes.actors}
    judged = decoded.map_batches(
        GladActor,
        fn_constructor_args=(actor,),
        compute=ray.data.ActorPoolStrategy(
            **pool,
            max_concurrent_calls_per_actor=sizes.calls,
            max_tasks_in_flight_per_actor=sizes.calls_in_flight,
        ),
        batch_size=sizes.rows,  # a block, that is; Ray Data wants a number where there are GPUs
        batch_format="pyarrow",
        num_cpus=actors.num_cpus,
        num_gpus=actors.num_gpus,
    )

    # 4 write: results and errors : files, and a row for each shard that they belong to (`WRITTEN_SCHEMA`).
    # No CPU: decoding tasks hold theirs to the end, and a write that waits for one would hold up the commits. Actors,
    # since Ray may end a task's process soon after it, and starting one takes seconds of a core. More of them when
    # shards wait to be written.
    return judged.map_batches(
        Writer,
        fn_constructor_args=(ResultsWriter(run, MOST_ROWS, plan.generation, staged), actor),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=sizes.writers),
        num_cpus=0,
        memory=memory,
    )


def _missing_shards(sizes: BatchSizes) -> Dataset:
    """The missing shards, a row for each, and how Ray Data is to run what follows."""
    import ray.data
    from ray.data.context import AutoscalingConfig

    shards = ray.data.from_items([{"shard": shard} for shard in sizes.shards], override_num_blocks=sizes.tasks)
    shards.context.target_max_block_size = sizes.block_bytes
    # An actor that has loaded gigabytes is not ended for want of work: its first shards may be late.
    shards.context.autoscaling_config = AutoscalingConfig(actor_pool_util_downscaling_threshold=-1)
    if sizes.store_bytes is not None:
        limit = ray.data.ExecutionResources(object_store_memory=sizes.store_bytes)
        shards.context.execution_options.resource_limits = limit
    return shards


class Writer:
    """The writing stage: a `ResultsWriter` that leaves a machine from which it cannot write."""

    def __init__(self, write: ResultsWriter, actor: ActorSettings) -> None:
        self.write, self.actor = write, actor

    def __call__(self, rows: pa.Table) -> pa.Table:
        try:
            return self.write(rows)
        except StorageError as error:
            _move_away("writing", self.actor, error)


def _move_away(stage: str, actor: ActorSettings, error: StorageError) -> NoReturn:
    """Have Ray repeat this process's work on another machine, if the job may have one.

    Raises:
        StorageError: it has none, or no process gets on.
    """
    import ray

    if actor.alone or actor.faults is None:
        raise error
    step_aside(actor.faults, stage, ray.get_runtime_context().get_node_id(), error)


def list_and_decode(
    run: Run, plan: Plan, reading: Reading, actor: ActorSettings
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """A stage: shards of the manifest in, a table of decoded rows out for each."""

    def elsewhere() -> Iterator[dict[str, Any]]:
        for part in range(ELSEWHERE):
            yield from read_shard(run, plan, (plan.shards - 1) * part // (ELSEWHERE - 1), 1).to_pylist()

    decode = fetch_and_decode(run.storage, framings_of(actor.models), reading, elsewhere)

    def stage(shards: pa.Table) -> Iterator[pa.Table]:
        try:
            for shard in shards.to_pylist():
                yield decode(read_shard(run, plan, shard["shard"], plan.rows_of(shard["shard"])))
        except StorageError as error:
            _move_away("decoding", actor, error)

    return stage


def read_shard(run: Run, plan: Plan, shard: int, rows: int) -> pa.Table:
    """The first rows of a shard of the manifest; their ``position`` is `MOST_ROWS` times the shard and more.

    Raises as `read_manifest`.
    """
    listing, first = plan.place_of(shard)
    table = read_manifest(run.path(MANIFEST, listing.name), listing.listed, first, first + rows, run.storage)
    positions = pa.array(range(MOST_ROWS * shard, MOST_ROWS * shard + len(table)), pa.int64())
    return table.set_column(table.schema.get_field_index("position"), "position", positions)


def framings_of(models: Models) -> Callable[[str | None], Sequence[Framing]]:
    """How the views of a category's model frame an image; those of any model if none knows the category."""
    framings = {key: settings.framings() for key, settings in models.settings().items()}
    some = next(iter(framings.values()))
    return lambda category: framings.get(models.key(category) or "", some)
