import time
from types import SimpleNamespace

import pytest

from cluster import session
from cluster.session import SessionError


def test_gpus_that_may_come_count():
    assert session.gpus({"CPU": 2}) == 0
    assert session.gpus({"GPU": 2}) == 2
    assert session.gpus({"GPU": 1, session.GPUS_TO_COME: 8}) == 8


NODES = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("bundle", "words"),
    [
        ({"CPU": 2.0}, "3 of 3 machines are large enough, but in use"),
        ({"CPU": 5.0, "GPU": 1.0}, "1 of 3 machines is large enough, but in use"),
        ({"GPU": 2.0}, "none of 3 machines is large enough"),
        ({"TPU": 1.0}, "none of 3 machines is large enough"),
    ],
)
def test_machines_with_room(bundle, words):
    assert session.room(NODES, bundle) == words


@pytest.mark.parametrize(
    ("launches", "nodes", "failures", "words"),
    [
        ([2], 1, ["old"], "3 more are being started"),
        ([], 1, [], "1 more is being started"),
        ([], 0, ["older", "no  spot\nmachines", None], "the last start failed: no spot machines"),
        ([], 0, [], "none is being started: add one, or ask for less"),
    ],
)
def test_machines_to_come(launches, nodes, failures, words):
    status = SimpleNamespace(
        pending_launches=[SimpleNamespace(count=count) for count in launches],
        pending_nodes=[None] * nodes,
        failed_launches=[SimpleNamespace(details=details) for details in failures],
    )
    assert session.machines_to_come(status) == words


def test_the_root_cause_is_the_innermost_of_ours_in_one_line():
    class Wrapper(SessionError):  # Ray's are instances of the class they wrap
        def __init__(self, cause):
            super().__init__("a stack of text")
            self.cause = cause

    outer = RuntimeError("outer")
    outer.__cause__ = Wrapper(SessionError("the reason\nand Ray's settings"))
    cause = session.root_cause(outer, SessionError)
    assert isinstance(cause, SessionError)
    assert str(cause) == "the reason"
    assert session.root_cause(outer, ValueError) is outer


@pytest.mark.slow
def test_a_waiting_actor_is_explained(ray_session):
    import ray

    @ray.remote
    class Actor:
        def ready(self):
            return True

    def line(num_cpus, num_gpus=0):
        deadline = time.monotonic() + 20
        while (text := session.waiting_for(num_cpus, num_gpus)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return text

    taken = Actor.options(num_cpus=1.25).remote()
    ray.get(taken.ready.remote())
    assert session.waiting_for(1.25, 0) is None
    waiting = [Actor.options(num_cpus=1.25).remote()]
    assert line(1.25) == (
        "waiting for room for an actor with 1.25 CPU: 1 of 1 machines is large enough, but in use; "
        "none is being started: add one, or ask for less"
    )
    waiting += [Actor.options(num_cpus=0.5, num_gpus=1).remote() for _ in range(2)]
    assert "2 actors with 0.5 CPU and 1 GPU: none of 1 machines is large enough;" in line(0.5, 1)
    # Work of another size is mentioned if no machine could ever take it.
    assert "a task with 0.5 CPU and 1 GPU" in line(0.125)
    del taken, waiting
