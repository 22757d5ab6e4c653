"""The actor of the scoring job: models loaded once, decoded rows in, `SCORED_SCHEMA` rows out in any order.

Ray Data keeps several batches in an actor at a time, each waiting for its own images; one thread runs the engines.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.quick_imports import quick_imports
from cluster.storage import Storage
from pipelines.models.find import Models, local_bundle
from pipelines.runs.schema import SCORED_SCHEMA

KEPT_MODELS = 4  # bundles an actor holds at a time
STEPS = [float(step) for step in range(50, 1000, 50)]  # boundaries of the stop-step histogram

logger = logging.getLogger("glad.actor")


@dataclass(frozen=True)
class ActorSettings:
    """What an actor needs to know; ``slots`` images are in flight, ``threads`` is its share of the machine's CPUs.

    ``run`` is the run's id, in metrics and log lines. With a ``memory`` (`patch_memory`) images are judged by it
    instead of by reconstruction.
    """

    models: Models
    storage: Storage
    seed: int
    maps: Literal["token", "full"]
    reconstructions: bool
    gpu: bool
    threads: int
    slots: int = 8
    search: Literal["scan", "guarded"] | None = None
    precision: Literal["off", "bf16", "fp16"] = "off"
    compiled: bool = False
    memory: str | None = None
    run: str = ""


class Watched:
    """What an actor counts, as metrics of Ray: `cluster/grafana/glad.json` draws them."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        tags = ("run", "category", "verdict")
        self.tags = {"run": run}
        self.images = Counter("glad_images", "Images judged: good, anomalous, unjudged (no threshold), error", tags)
        self.stop_step = Histogram("glad_stop_step", "Adaptive step of an image", STEPS, ("run", "category"))
        self.seconds = Histogram(
            "glad_image_seconds", "Model time of an image", [0.1, 0.3, 1, 3, 10, 30, 100], ("run",)
        )
        self.occupancy = Gauge("glad_slot_occupancy", "Share of slots that held an image while others waited", ("run",))

    def count(self, row: dict[str, Any]) -> None:
        """One row of the results or errors."""
        category = {"category": row.get("category") or ""}
        verdict = {None: "unjudged", True: "anomalous", False: "good"}[row.get("is_anomalous")]
        verdict = "error" if row.get("error_type") else verdict
        self.images.inc(1, self.tags | category | {"verdict": verdict})
        if row.get("stop_step") is not None:
            self.stop_step.observe(row["stop_step"], self.tags | category)
        if row.get("seconds"):
            self.seconds.observe(row["seconds"], self.tags)


class EngineThread(threading.Thread):
    """Runs engines, images going in by `judge` and verdicts coming out by callback, until the process ends."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="glad-engine")
        self.arrived: queue.SimpleQueue[tuple[Any, Any, Any]] = queue.SimpleQueue()
        self.start()

    def judge(self, engine: Any, request: Any) -> asyncio.Future[Any]:
        """A future, of the running event loop, for the `Detection`."""
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
        callbacks: dict[Any, Any] = {}
        engines: dict[int, Any] = {}
        try:
            while True:
                while not self.arrived.empty() or not engines:
                    engine, request, callback = self.arrived.get()
                    try:
                        engine.submit(request)
                    except Exception as error:
                        callback(error)
                        continue
                    callbacks[request] = callback
                    engines[id(engine)] = engine
                for engine in list(engines.values()):
                    for request, verdict in engine.tick():
                        callbacks.pop(request)(verdict)
                    if not engine.busy:
                        del engines[id(engine)]
        except BaseException:
            # The device no longer answers. Ray starts another actor and gives it the rows.
            logger.exception("the engine died")
            os._exit(1)


def set_up(gpu: bool, threads: int) -> None:
    """PyTorch in a process that runs engines, in ``threads`` threads on a CPU."""
    import torch

    import glad_core.engine.engine  # noqa: F401  (all that engines import)
    from glad_core.engine.networks import keep_buffers

    torch.set_num_threads(threads)
    if not gpu:
        keep_buffers()
    # TF32 rounds differently for every batch shape; an image's score must not depend on its neighbours.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


class GladActor:
    """Callable for ``map_batches``, several calls at a time."""

    def __init__(self, settings: ActorSettings) -> None:
        self.settings = settings
        self.engines: OrderedDict[str, Any] = OrderedDict()
        self.memory: Any = None
        self.failure: Exception | None = None
        self.watched = Watched(settings.run)
        try:
            self._prepare()
            logger.info("actor ready", extra={"run": settings.run})
        except Exception as error:  # Ray would restart the actor for ever and bury the reason; the first call tells it
            self.failure = error
        self.thread = EngineThread()

    async def __call__(self, rows: pa.Table) -> AsyncIterator[pa.Table]:
        if self.failure is not None:
            raise self.failure
        decoded = {row["image_id"]: row for row in rows.to_pylist()}
        out = [self._error(row) for row in decoded.values() if row["error_type"] is not None]
        judged = await asyncio.gather(*(self._judge(row) for row in decoded.values() if row["error_type"] is None))
        for row in out + judged:
            self.watched.count(row)
        busy = [engine.occupancy for engine in self.engines.values()]
        if busy:
            self.watched.occupancy.set(sum(busy) / len(busy), self.watched.tags)
        yield pa.Table.from_pylist(out + judged, schema=SCORED_SCHEMA)

    def _prepare(self) -> None:
        # diffusers takes these in where it finds them; an actor needs none. peft imports transformers in its turn.
        with quick_imports("transformers", "peft", "scipy"):
            set_up(self.settings.gpu, self.settings.threads)
        if self.settings.memory is not None:
            from pipelines.score.patch_memory import read_memory

            self.memory = read_memory(self.settings.memory, self.settings.storage)
        if "" in self.settings.models.bundles:
            self._engine("")

    def _engine(self, key: str) -> Any:
        """The engine of a bundle; an archive comes category by category, so a few of them kept are enough."""
        from glad_core.bundle.model import AUTOCAST, load_bundle
        from glad_core.engine.engine import Engine
        from glad_core.engine.nearest import NearestEngine

        settings = self.settings
        if key not in self.engines:
            idle = next((key for key, engine in self.engines.items() if not engine.busy), None)
            if len(self.engines) >= KEPT_MODELS and idle is not None:
                del self.engines[idle]
            path = local_bundle(settings.models.bundles[key], settings.storage)
            device = "cuda" if settings.gpu else "cpu"
            model = load_bundle(path, device=device, autocast=AUTOCAST[settings.precision])
            if self.memory is not None:
                self.engines[key] = NearestEngine(model, self.memory.patches, settings.slots)
            else:
                self.engines[key] = Engine(model, settings.slots, settings.seed, settings.search, settings.compiled)
        self.engines.move_to_end(key)
        return self.engines[key]

    async def _judge(self, row: dict[str, Any]) -> dict[str, Any]:
        """One output row for one input row."""
        from glad_core.verdict import Request

        key = self.settings.models.key(row["category"])
        if key is None:
            known = ", ".join(self.settings.models.categories)
            message = f"no model for category '{row['category']}'; there are {known}"
            return self._error(row | {"stage": "score", "error_type": "no_model", "message": message})
        engine = self._engine(key)
        side = engine.model.settings.resolution
        pixels = np.frombuffer(row["image"], np.uint8).reshape(side, side, 3)
        try:
            detection = await self.thread.judge(engine, Request(row["image_id"], pixels, row["category"]))
        except Exception as error:
            reason = " ".join(str(error).split())[:500]
            return self._error(row | {"stage": "score", "error_type": type(error).__name__, "message": reason})
        return self._result(engine.model, row, detection)

    def _result(self, model: Any, row: dict[str, Any], detection: Any) -> dict[str, Any]:
        threshold = self.memory.threshold if self.memory else model.settings.threshold_for(row["category"])
        anomaly_map = self._map(model, detection.anomaly_map)
        keep = self.settings.reconstructions and self.memory is None
        return {
            "image_id": row["image_id"],
            "uri": row["uri"],
            "category": row["category"] or model.category,
            "model_id": model.model_id,
            "score": detection.score,
            "threshold": threshold,
            "is_anomalous": None if threshold is None else bool(np.float32(detection.score) > np.float32(threshold)),
            "stop_step": detection.stop_step,
            "stop_reason": detection.stop_reason,
            "steps": [{"timestep": timestep, "score": score} for timestep, score in detection.steps],
            "anomaly_map": anomaly_map.ravel(),
            "map_height": anomaly_map.shape[0],
            "map_width": anomaly_map.shape[1],
            "reconstruction": _png(detection.reconstruction) if keep else None,
            "width": row["width"],
            "height": row["height"],
            "seconds": detection.seconds,
            "position": row["position"],
        }

    def _map(self, model: Any, anomaly_map: np.ndarray) -> np.ndarray:
        import torch

        from glad_core.judge import full_size_only
        from glad_core.scoring import full_size_map

        if self.settings.maps == "token" or full_size_only(model):
            return anomaly_map
        full = full_size_map(torch.from_numpy(anomaly_map)[None].float(), model.settings)
        return full[0].numpy().astype(np.float16)

    @staticmethod
    def _error(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in ("image_id", "uri", "stage", "error_type", "message", "position")}


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
