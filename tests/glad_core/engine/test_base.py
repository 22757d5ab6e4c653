"""The queue by itself: a failure costs only the image that caused it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glad_core.bundle.model import load_bundle
from glad_core.engine.base import Queue, Verdict, run
from glad_core.errors import GladError
from glad_core.verdict import Request


class Echo(Queue):
    """Judges a request by its id; an id in ``broken`` fails its whole batch, a batch above ``memory`` does not fit."""

    def __init__(self, slots: int, broken: tuple[str, ...] = (), memory: int = 100) -> None:
        super().__init__(SimpleNamespace(device=torch.device("cpu")), slots)
        self.broken, self.memory, self.batches = broken, memory, []

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def work(self) -> list[Verdict]:
        self.admit()
        self.batches.append([request.image_id for request in self.entering])
        if len(self.entering) > self.memory:
            raise MemoryError
        if any(request.image_id in self.broken for request in self.entering):
            raise ValueError("broken")
        verdicts = [(request, request.image_id) for request in self.entering]
        self.entering = []
        return verdicts


def requests(count: int) -> list[Request]:
    return [Request(str(index), np.zeros((1, 1, 3), np.uint8)) for index in range(count)]


@pytest.mark.parametrize("broken", [(), ("0",), ("5",), ("9",), ("2", "3"), tuple("0123456789")])
def test_only_the_broken_images_fail(broken: tuple[str, ...]) -> None:
    verdicts = {request.image_id: verdict for request, verdict in run(Echo(4, broken), requests(10))}
    assert len(verdicts) == 10
    for image_id, verdict in verdicts.items():
        assert isinstance(verdict, ValueError) if image_id in broken else verdict == image_id


def test_batches_grow_again_after_a_failure() -> None:
    queue = Echo(4, ("1",))
    assert len(list(run(queue, requests(20)))) == 20
    assert queue.limit == queue.slots == 4
    assert len(queue.batches[-2]) == 4


def test_batches_stay_small_enough_for_the_memory() -> None:
    queue = Echo(8, memory=3)
    assert [verdict for _, verdict in run(queue, requests(20))] == [str(index) for index in range(20)]
    assert queue.slots == 2
    assert max(len(batch) for batch in queue.batches[3:]) <= 2


def test_no_more_than_one_slotful_waits() -> None:
    queue, taken = Echo(3), 0

    def source():
        nonlocal taken
        for request in requests(12):
            taken += 1
            yield request

    for finished, _ in enumerate(run(queue, source()), start=1):
        assert taken <= finished + 2 * queue.slots


def test_a_request_that_does_not_fit_the_bundle_is_refused_at_once(tiny_bundle) -> None:
    queue = Echo(2)
    queue.model = load_bundle(tiny_bundle)
    with pytest.raises(GladError, match="resize it to what the bundle's method sees"):
        Queue.submit(queue, Request("x", np.zeros((8, 8, 3), np.uint8)))
    assert not queue.busy
