"""The one thread of an actor that runs its engines, while the actor's calls wait for their images."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from typing import Any

from pipelines.score.suspects import Suspects

logger = logging.getLogger("glad.actor")


class EngineThread(threading.Thread):
    """Runs engines until the process ends: images enter by `judge`, their verdicts settle futures.

    Images that were at work when this process died before are judged with nothing else in flight (`Suspects`).
    """

    def __init__(self, suspects: Suspects) -> None:
        super().__init__(daemon=True, name="glad-engine")
        self.suspects = suspects
        self.suspect: tuple[Any, Any, Any] | None = None  # has arrived, waits until nothing is in flight
        self.alone = False  # a suspect is in flight
        self.arrived: queue.SimpleQueue[tuple[Any, Any, Any]] = queue.SimpleQueue()
        self.callbacks: dict[Any, Any] = {}  # by request
        self.engines: dict[int, Any] = {}  # with images in flight, by identity
        self.start()

    def judge(self, engine: Any, request: Any) -> asyncio.Future[Any]:
        """Submit a request to an engine; returns a future of the running event loop for its `Detection`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(verdict: Any) -> None:
            if future.done():  # Ray has cancelled the call
                return
            if isinstance(verdict, Exception):
                future.set_exception(verdict)
            else:
                future.set_result(verdict)

        self.arrived.put((engine, request, lambda verdict: loop.call_soon_threadsafe(settle, verdict)))
        return future

    def run(self) -> None:
        try:
            while True:
                self._submit_arrived()
                self.suspects.note([r.image_id for engine in self.engines.values() for r in engine.at_work()])
                self._tick()
        except BaseException:
            # The device no longer answers. Ray starts another actor and gives it the rows.
            logger.exception("the engine died")
            os._exit(1)

    def _submit_arrived(self) -> None:
        """Submit what has arrived, up to a suspect; wait for an arrival if nothing is in flight."""
        while not self.alone and self.suspect is None and not (self.arrived.empty() and self.engines):
            arrival = self.arrived.get()
            if self.suspects.suspected(arrival[1].image_id):
                self.suspect = arrival
            else:
                self._submit(*arrival)
        if self.suspect is not None and not self.engines:
            suspect, self.suspect, self.alone = self.suspect, None, True
            self._submit(*suspect)

    def _submit(self, engine: Any, request: Any, callback: Any) -> None:
        try:
            engine.submit(request)
        except Exception as error:
            self.alone = False
            callback(error)
            return
        self.callbacks[request] = callback
        self.engines[id(engine)] = engine

    def _tick(self) -> None:
        for engine in list(self.engines.values()):
            for request, verdict in engine.tick():
                self.callbacks.pop(request)(verdict)
            if not engine.busy:
                del self.engines[id(engine)]
        if not self.engines:
            self.alone = False
            self.suspects.note([])
