"""A queue of images in front of a model: a bounded number is in flight, and a failure costs only its own image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from glad_core.bundle.model import Model
from glad_core.verdict import Detection, Request, check_request

Verdict = tuple[Request, Detection | Exception]


class Queue(ABC):
    """Images that wait and images in flight; a subclass defines the work.

    After a failure all images in flight return to the queue and half as many are admitted, down to one. So an image
    that breaks its batch is found and reported alone, a batch too large for the device's memory shrinks, and no other
    image is lost.
    """

    def __init__(self, model: Model, slots: int) -> None:
        self.model, self.slots = model, slots
        self.limit = slots  # images in flight at most; fewer after a failure
        self.waiting: deque[Request] = deque()
        self.entering: list[Request] = []  # admitted, not yet worked on

    @property
    def occupancy(self) -> float:
        """Share of the slots that held an image while others waited."""
        return 1.0

    def submit(self, request: Request) -> None:
        """Queue an image.

        Raises:
            GladError: it does not fit the bundle.
        """
        check_request(self.model, request)
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        """Whether any image waits or is in flight."""
        return bool(self.waiting or self.in_flight())

    def tick(self) -> list[Verdict]:
        """Do one piece of work; returns the images that it finished and those that failed, in any order."""
        try:
            with torch.inference_mode():
                verdicts = self.work()
        except Exception as error:
            return self._after_failure(error)
        if verdicts:
            self.limit = min(self.slots, 2 * self.limit)
        return verdicts

    def admit(self) -> None:
        """Move waiting images to ``entering``, as many as the limit allows."""
        self.entering += [self.waiting.popleft() for _ in range(len(self.at_work()) - len(self.in_flight()))]

    def in_flight(self) -> list[Request]:
        """The requests that return to the queue after a failure."""
        return self.entering

    def at_work(self) -> list[Request]:
        """The requests that the next piece of work is about: those in flight and those that it admits."""
        in_flight = self.in_flight()
        return in_flight + list(islice(self.waiting, max(0, self.limit - len(in_flight))))

    @abstractmethod
    def work(self) -> list[Verdict]:
        """`admit` images and advance those in flight; returns the finished ones."""

    def drop(self) -> None:
        """Forget the images in flight."""
        self.entering = []

    def _after_failure(self, error: Exception) -> list[Verdict]:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()  # raises if the device no longer answers: this engine is dead
            torch.cuda.empty_cache()
        failed = self.in_flight()
        self.drop()
        if len(failed) <= 1:
            self.limit = min(self.slots, 2 * self.limit)
            return [(request, error) for request in failed]
        self.waiting.extendleft(reversed(failed))
        self.limit = len(failed) // 2
        if _out_of_memory(error):
            self.slots = self.limit
        return []


def run(engine: Queue, requests: Iterable[Request]) -> Iterator[Verdict]:
    """Send all requests through the engine; yields verdicts as they come, in any order.

    Raises:
        GladError: a request does not fit the bundle.
    """
    source = iter(requests)
    more = True
    while more or engine.busy:
        # At most one slotful waits, so that an archive need not fit in memory.
        while more and len(engine.waiting) < engine.slots:
            request = next(source, None)
            if request is None:
                more = False
            else:
                engine.submit(request)
        if engine.busy:
            yield from engine.tick()


def _out_of_memory(error: Exception) -> bool:
    """CUDA raises an exception of its own for this; the CPU allocator only differs in the message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
