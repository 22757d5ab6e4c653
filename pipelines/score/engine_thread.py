"""The one thread of an actor that runs its engines, while the actor's calls wait for their images."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from typing import Any

logger = logging.getLogger("glad.actor")


class EngineThread(threading.Thread):
    """Runs engines until the process ends: images enter by `judge`, their verdicts settle futures."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="glad-engine")
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
                self._tick()
        except BaseException:
            # The device no longer answers. Ray starts another actor and gives it the rows.
            logger.exception("the engine died")
            os._exit(1)

    def _submit_arrived(self) -> None:
        """Submit what has arrived; wait for an arrival if no image is in flight."""
        while not self.arrived.empty() or not self.engines:
            engine, request, callback = self.arrived.get()
            try:
                engine.submit(request)
            except Exception as error:
                callback(error)
                continue
            self.callbacks[request] = callback
            self.engines[id(engine)] = engine

    def _tick(self) -> None:
        for engine in list(self.engines.values()):
            for request, verdict in engine.tick():
                self.callbacks.pop(request)(verdict)
            if not engine.busy:
                del self.engines[id(engine)]
