import time

import pytest

from cluster import session

pytestmark = pytest.mark.slow


def test_gpus_that_may_come_count():
    assert session.gpus({"CPU": 2}) == 0
    assert session.gpus({"GPU": 2}) == 2
    assert session.gpus({"GPU": 1, session.GPUS_TO_COME: 8}) == 8


def test_what_an_actor_waits_for_is_said(ray_session):
    import ray

    @ray.remote
    class Actor:
        def ready(self):
            return True

    def said(num_cpus, num_gpus=0):
        deadline = time.monotonic() + 20
        while (line := session.waiting_for(num_cpus, num_gpus)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return line

    taken = Actor.options(num_cpus=1.25).remote()
    ray.get(taken.ready.remote())
    assert session.waiting_for(1.25, 0) is None
    waiting = [Actor.options(num_cpus=1.25).remote()]
    assert said(1.25) == (
        "waiting for room for an actor with 1.25 CPU: 1 of 1 machines is large enough, and taken; "
        "none is being started: add one, or ask for less"
    )
    waiting += [Actor.options(num_cpus=0.5, num_gpus=1).remote() for _ in range(2)]
    assert "2 actors with 0.5 CPU and 1 GPU: none of 1 machines is large enough;" in said(0.5, 1)
    # Work of another size is told where no machine could ever take it.
    assert "a task with 0.5 CPU and 1 GPU" in said(0.125)
    del taken, waiting
