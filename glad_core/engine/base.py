"""Who is let in: images wait, a bounded number is in flight, and a failure costs only the image that caused it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from glad_core.bundle.model import Model
from glad_core.verdict import Detection, Request, check_request

Verdict = tuple[Request, Detection | Exception]


class Queue(ABC):
    """Images that wait, and a failure that costs only the image that caused it. Subclasses say what the work is.

    After a failure everything in flight goes back and only half as many are let in, down to one: an image that breaks
    its batch is told apart, and a batch too large for the device's memory shrinks; no other image is lost.
    """

    def __init__(self, model: Model, slots: int) -> None:
        self.model, self.slots = model, slots
        self.limit = slots  # images let in; fewer after a failure
        self.waiting: deque[Request] = deque()
        self.coming: list[Request] = []

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
        """A piece of work; returns the images that got finished, and those that failed, in any order."""
        try:
            with torch.inference_mode():
                done = self.work()
        except Exception as error:
            return self._give_way(error)
        if done:
            self.limit = min(self.slots, 2 * self.limit)
        return done

    def admit(self) -> None:
        """Move waiting images to ``coming``, as many as there is room for."""
        room = self.limit - len(self.in_flight())
        self.coming += [self.waiting.popleft() for _ in range(max(0, min(len(self.waiting), room)))]

    def in_flight(self) -> list[Request]:
        """What a failure sends back."""
        return self.coming

    @abstractmethod
    def work(self) -> list[Verdict]:
        """`admit` images and bring those in flight forward; returns the finished ones."""

    def drop(self) -> None:
        """Forget what is in flight."""
        self.coming = []

    def _give_way(self, error: Exception) -> list[Verdict]:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()  # a device that no longer answers raises here: this engine is dead
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
    """All requests through the engine; verdicts as they come, in any order.

    Raises:
        GladError: a request does not fit the bundle.
    """
    source = iter(requests)
    more = True
    while more or engine.busy:
        # One slotful ahead, so that an archive need not be in memory.
        while more and len(engine.waiting) < engine.slots:
            request = next(source, None)
            if request is None:
                more = False
            else:
                engine.submit(request)
        if engine.busy:
            yield from engine.tick()


def _out_of_memory(error: Exception) -> bool:
    """CUDA has an exception for it; the CPU allocator only a text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
