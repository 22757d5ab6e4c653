"""The sizes of a job's batches, for archives and clusters of any size."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipelines.archive.manifest import PART_ROWS
from pipelines.runs.claim import Plan, draft
from pipelines.score.actor_plan import ActorPlan
from pipelines.score.batch_sizes import LEAST_STORE, MAX_TASKS, SHARD_BYTES, Images, batch_sizes, rows_and_shards

IMAGES = Images(pixels=128**2, maps="token", reconstructions=False)


def plan_of(images: int, rows_per_shard: int = 8) -> Plan:
    return replace(draft([images], "listing", None, {}, most_rows=512), rows_per_shard=rows_per_shard)


def actors_of(actors: int, slots: int = 16, grows: bool = False, decoders: int = 2) -> ActorPlan:
    return ActorPlan(actors, 0.75, 0.0, 1, slots, decoders, grows, actors)


@given(
    images=st.integers(1, 20_000),
    rows=st.sampled_from([8, 16, 128, 512]),
    actors=st.integers(1, 40),
    slots=st.integers(1, 64),
    grows=st.booleans(),
    data=st.data(),
)
def test_every_missing_image_is_decoded_once_and_no_size_is_zero(images, rows, actors, slots, grows, data):
    plan = plan_of(images, rows)
    done = data.draw(st.sets(st.integers(0, plan.shards - 1), max_size=plan.shards - 1))
    sizes = batch_sizes(plan, done, actors_of(actors, slots, grows), IMAGES, alone=not grows)
    images_of = [(plan.place_of(shard)[1], plan.rows_of(shard)) for shard in sizes.shards]
    positions = [position for first, count in images_of for position in range(first, first + count)]
    assert positions == [position for position in range(images) if position // rows not in done]
    assert all(first // PART_ROWS == (first + count - 1) // PART_ROWS for first, count in images_of)
    assert sizes.rows == rows
    assert 1 <= sizes.tasks <= min(MAX_TASKS, len(sizes.shards))
    assert 1 <= sizes.actors <= actors
    # A whole shard leaves a decoding task as one block: it is as large as a block, and not so large that Ray cuts it.
    assert sizes.block_bytes < rows * IMAGES.decoded_bytes < 1.5 * sizes.block_bytes
    assert sizes.calls * rows >= 3 * slots or sizes.calls * sizes.actors >= len(sizes.shards)
    assert sizes.calls_in_flight >= sizes.calls >= 2
    # Ray Data enlarges a pool only if so many calls are in flight.
    assert not grows or sizes.calls_in_flight >= 1.75 * sizes.calls
    assert 1 <= sizes.writers <= actors


def test_a_small_archive_is_shared_out_to_all_actors():
    sizes = batch_sizes(plan_of(64), set(), actors_of(2), IMAGES, alone=True)
    assert (sizes.actors, sizes.calls_in_flight) == (2, 4)  # the first to be ready takes half of the eight shards
    assert batch_sizes(plan_of(8), set(), actors_of(4), IMAGES, alone=True).actors == 1
    assert batch_sizes(plan_of(64), set(range(7)), actors_of(4), IMAGES, alone=True).actors == 1


def test_shards_are_bounded_by_bytes_and_enough_for_all_actors():
    for resolution in (32, 128, 256, 512, 1024, 4096):
        rows, _ = rows_and_shards(resolution**2, actors_of(2))
        assert PART_ROWS % rows == 0
        assert rows == 1 or rows * resolution**2 * 3 <= SHARD_BYTES
        assert rows == PART_ROWS or 2 * rows * resolution**2 * 3 > SHARD_BYTES
    assert rows_and_shards(512**2, actors_of(2)) == (64, 50)
    assert rows_and_shards(512**2, actors_of(48)) == (64, 1200)
    assert rows_and_shards(512**2, replace(actors_of(1, grows=True), most=100))[1] == 2500


def test_writers_follow_the_actors():
    for actors, writers in ((1, 1), (8, 1), (9, 2), (48, 6), (400, 50)):
        assert batch_sizes(plan_of(10_000), set(), actors_of(actors), IMAGES, alone=False).writers == writers


def test_the_object_store_is_limited_only_on_this_machine():
    plan, actors = plan_of(1000, 16), actors_of(2)
    assert batch_sizes(plan, set(), actors, IMAGES, alone=False).store_bytes is None
    small = batch_sizes(plan, set(), actors, Images(32**2, "token", False), alone=True).store_bytes
    large = batch_sizes(plan, set(), actors, Images(512**2, "full", True), alone=True).store_bytes
    assert small == LEAST_STORE
    assert large == 3 * (2 + 2 * 2 * 3) * 16 * 512 * 512 * 3  # decoders and twice the actors
