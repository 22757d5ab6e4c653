import pytest

from glad_core.errors import GladError
from pipelines.score.actor_plan import ActorPlan, ActorWishes, gpu_slots, plan_actors

GIB = 2**30


def plan(available, weights=GIB // 64, **asked):
    return plan_actors(available, ActorWishes(**asked), weights)


def test_defaults_fill_the_machine_and_leave_room_for_tasks():
    for cpus in (1, 2, 4, 16, 64):
        found = plan({"CPU": cpus, "memory": 512 * GIB})
        assert 1 <= found.actors <= cpus
        assert found.actors * found.num_cpus <= cpus - 0.25
    assert plan({"CPU": 2, "memory": 16 * GIB}) == ActorPlan(2, 0.75, 0, 1, slots=16, decoders=2, most=2)


def test_memory_limits_large_models():
    assert plan({"CPU": 64, "memory": 32 * GIB}, weights=3 * GIB).actors == 3


def test_gpus_are_used_when_there_are_some_and_can_be_shared():
    assert plan({"CPU": 16, "GPU": 4}) == ActorPlan(4, 0.5, 1, 1, slots=8, decoders=14, most=4)
    assert plan({"CPU": 16, "GPU": 1}, num_gpus=0.5).actors == 2
    assert plan({"CPU": 16, "GPU": 1}, batch_size=3).slots == 3
    assert plan({"CPU": 16, "GPU": 1, "memory": 64 * GIB}, num_gpus=0).num_gpus == 0


def test_threads_follow_the_cpu_share():
    assert plan({"CPU": 8, "memory": 64 * GIB}, num_cpus=3.5, actors=2) == ActorPlan(
        2, 3.5, 0, 4, slots=16, decoders=2, most=2
    )


def test_decoders_take_the_cores_that_actors_leave():
    assert plan({"CPU": 2, "memory": 16 * GIB}, actors=1).decoders == 1
    assert plan({"CPU": 16, "GPU": 1}).decoders == 15


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_gpus": 1}, "has 0"),
        ({"num_gpus": 1.5}, "fraction of one GPU"),
        ({"actors": 3}, "lower --actors"),
        ({"num_cpus": 2.0}, "lower --actors"),
    ],
)
def test_more_than_the_machine_has_is_refused_instead_of_waiting_for_ever(asked, words):
    with pytest.raises(GladError, match=words):
        plan({"CPU": 2, "memory": 16 * GIB}, **asked)


def test_a_cluster_begins_with_what_fits_now_and_grows():
    found = plan({"CPU": 2, "memory": 16 * GIB}, address="auto")
    assert found == ActorPlan(2, 0.75, 0, 1, slots=16, decoders=4, grows=True, most=2)
    assert found.describe() == "2 actors with 0.75 CPU each, more as the cluster grows"
    assert not plan({"CPU": 2, "memory": 16 * GIB}).grows


def test_actors_asked_for_wait_for_room_on_a_cluster():
    found = plan({"CPU": 2, "memory": GIB}, num_gpus=1, actors=8, address="auto")
    assert found == ActorPlan(8, 0.5, 1, 1, slots=8, decoders=8, most=8)


def test_gpus_that_the_autoscaler_may_bring_are_waited_for():
    idle = {"CPU": 2, "memory": 16 * GIB, "gpus_to_come": 8}
    assert plan(idle, address="auto") == ActorPlan(1, 0.5, 1, 1, slots=8, decoders=16, grows=True, most=8)
    assert plan(idle, address="auto", num_gpus=0).num_gpus == 0
    assert plan(idle | {"GPU": 3}, address="auto").actors == 3


def test_images_in_flight_follow_the_memory_of_the_gpu():
    weights = 4.2e9  # Stable Diffusion v1-4 and DINO ViT-B/8 in float32
    found = {gigabytes: gpu_slots(gigabytes * 1e9, weights, 512) for gigabytes in (6, 16, 24, 80)}
    assert found == {6: 1, 16: 6, 24: 10, 80: 16}
    assert gpu_slots(12e9, weights, 512) == gpu_slots(0.5 * 24e9, weights, 512) < found[16]  # half of a GPU
    assert gpu_slots(16e9, 1e8, 256) > found[16]
