"""The actor of the scoring job: models loaded once, decoded rows in, `SCORED_SCHEMA` rows out in any order.

Ray Data keeps several calls in an actor at a time. Each waits for its own images while one thread runs the engines.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.quick_imports import quick_imports
from cluster.storage import Storage, StorageError
from glad_core.bundle.settings import Precision, Settings
from glad_core.doubt import doubt_about
from glad_core.engine.process import set_up
from glad_core.engine.search import Search
from glad_core.errors import GladError
from pipelines.models.find import Models, local_bundle
from pipelines.runs.schema import SCORED_SCHEMA
from pipelines.score.actor_metrics import ActorMetrics
from pipelines.score.actor_plan import gpu_slots
from pipelines.score.engine_thread import EngineThread
from pipelines.score.faults import step_aside
from pipelines.score.request import Maps
from pipelines.score.suspects import Suspects

OVERFLOW = "score it with --precision off, else with another bundle"
DEADLY = "the process that judged it died twice with no other image at work"
ERROR_COLUMNS = ("image_id", "uri", "stage", "error_type", "message")
STAGE = "an actor"  # in what users read
TELL_EVERY = 10.0  # seconds
NOTHING = np.empty((0, 0, 3), np.uint8)
KEPT_MODELS = 4  # bundles an actor holds at a time

logger = logging.getLogger("glad.actor")


@dataclass(frozen=True)
class ActorSettings:
    """Everything an actor needs.

    ``slots`` is the number of images in flight, None for what the GPU's memory holds; ``threads`` and ``gpu`` are the
    actor's share of the machine's CPUs and of a GPU. ``run`` is the run's id, for metrics and log lines. With
    ``memory``, the location of a patch memory (`patch_memory`), images are judged by their nearest good patches and not
    by reconstruction. ``faults`` is the job's `faults.Faults`, None outside of one. A job that has the machine
    ``alone`` stops if storage fails, since there is no other machine to go to.
    """

    models: Models
    storage: Storage
    seed: int
    maps: Maps
    reconstructions: bool
    gpu: float
    threads: int
    slots: int | None = 8
    search: Search | None = None
    precision: Precision = "off"
    compiled: bool = False
    memory: str | None = None
    run: str = ""
    faults: Any = None
    alone: bool = True


class GladActor:
    """Callable for ``map_batches``, several calls at a time."""

    def __init__(self, settings: ActorSettings) -> None:
        self.settings = settings
        self.engines: OrderedDict[str, list[Any]] = OrderedDict()  # of a bundle, by view
        self.memory: Any = None
        self.failure: Exception | None = None
        self.metrics = ActorMetrics(settings.run)
        self.name = _name()
        self.told = 0.0
        suspects = Suspects(self.name if settings.faults else None)
        try:
            if settings.faults:
                settings.faults.starts.remote(f"{STAGE} {self.name}")
            self._prepare()
            self._tell()
            logger.info("actor ready", extra={"run": settings.run})
        except Exception as error:  # raised by the first call: here Ray would restart the actor for ever, and hide it
            self.failure = self._failure(error)
        self.thread = EngineThread(suspects)

    async def __call__(self, rows: pa.Table) -> AsyncIterator[pa.Table]:
        if self.failure is not None:
            raise self.failure
        images = rows["image"]
        decoded = rows.drop_columns(["image"]).to_pylist()
        failed = [_error(row) for row in decoded if row["error_type"] is not None]
        judged = await asyncio.gather(
            *(self._judge(row, images[number]) for number, row in enumerate(decoded) if row["error_type"] is None)
        )
        for row in failed + judged:
            self.metrics.count(row)
        self.metrics.set_occupancy([engine.occupancy for engines in self.engines.values() for engine in engines])
        yield pa.Table.from_pylist(failed + judged, schema=SCORED_SCHEMA)

    def _failure(self, error: Exception) -> Exception:
        """The error that is to end the job. If it concerns this process alone, the process ends instead."""
        faults, alone = self.settings.faults, self.settings.alone
        if faults is None or isinstance(error, GladError) or (alone and isinstance(error, StorageError)):
            return error
        try:
            step_aside(faults, STAGE, self.name, error)
        except (GladError, StorageError) as final:
            return final

    def _tell(self) -> None:
        """Tell the job, not too often, that this process works."""
        if self.settings.faults and time.monotonic() - self.told > TELL_EVERY:
            self.told = time.monotonic()
            self.settings.faults.works.remote(f"{STAGE} {self.name}")

    def _prepare(self) -> None:
        # diffusers imports these packages if it finds them, and peft imports transformers; an actor needs none.
        with quick_imports("transformers", "peft", "scipy"):
            set_up(bool(self.settings.gpu), self.settings.threads)
        if self.settings.memory is not None:
            from pipelines.score.patch_memory import read_memory

            self.memory = read_memory(self.settings.memory, self.settings.storage)
        if "" in self.settings.models.bundles:
            self._engines("")

    def _engines(self, key: str) -> list[Any]:
        """A bundle's engine for each view. A few are kept, which is enough since an archive comes by category."""
        if key not in self.engines:
            idle = next((key for key, engines in self.engines.items() if not any(e.busy for e in engines)), None)
            if len(self.engines) >= KEPT_MODELS and idle is not None:
                del self.engines[idle]
            self.engines[key] = self._load(key)
        self.engines.move_to_end(key)
        return self.engines[key]

    def _load(self, key: str) -> list[Any]:
        from glad_core.bundle.model import AUTOCAST, load_bundle
        from glad_core.engine.engine import Engine
        from glad_core.engine.nearest import NearestEngine

        settings = self.settings
        path = local_bundle(settings.models.bundles[key], settings.storage)
        device = "cuda" if settings.gpu else "cpu"
        begun_with = settings.models.descriptions[key].model_id
        model = load_bundle(path, device=device, autocast=AUTOCAST[settings.precision], model_id=begun_with)
        if self.memory is not None:
            model = replace(model, settings=self.memory.settings(model.settings), memory=self.memory.patches)
        slots = settings.slots or _gpu_slots(settings.gpu, model.settings.resolution)
        if model.settings.method == "nearest":
            return [NearestEngine(model, patches, slots) for patches in model.memory]
        return [Engine(model, slots, settings.seed, settings.search, settings.compiled)] * len(model.settings.views)

    async def _judge(self, row: dict[str, Any], image: pa.LargeBinaryScalar) -> dict[str, Any]:
        """One output row for one decoded row and its pixels."""
        from glad_core.verdict import NotFinite

        if self.thread.suspects.guilty(row["image_id"]):
            return _error(row | {"stage": "score", "error_type": "deadly", "message": DEADLY})
        key = self.settings.models.key(row["category"])
        if key is None:
            known = ", ".join(self.settings.models.categories)
            message = f"no model for category '{row['category']}'; there are {known}"
            return _error(row | {"stage": "score", "error_type": "no_model", "message": message})
        try:
            engines = self._engines(key)
        except Exception as error:
            raise self._failure(error) from error
        try:
            detection = await self._detect(engines, row, image)
        except NotFinite as error:
            return _error(row | {"stage": "score", "error_type": "not_finite", "message": f"{error}; {OVERFLOW}"})
        except Exception as error:
            reason = " ".join(str(error).split())[:500]
            return _error(row | {"stage": "score", "error_type": type(error).__name__, "message": reason})
        self._tell()
        return self._result(engines[0].model, row, detection)

    async def _detect(self, engines: list[Any], row: dict[str, Any], image: pa.LargeBinaryScalar) -> Any:
        """The verdict on a picture; its tiles go through the engines as images of their own."""
        from glad_core.stitch import stitch, tile_requests

        settings = engines[0].model.settings
        size = (row["height"], row["width"])
        frames = _frames(image, settings, size)
        by_view = tile_requests(row["image_id"], frames, settings, size, row["category"])
        keeps = self._keeps(settings)

        async def judge(engine: Any, request: Any) -> Any:
            detection = await self.thread.judge(engine, request)
            # Or a huge picture would be held a second time until its last tile is judged.
            return detection if keeps else replace(detection, reconstruction=NOTHING)

        judged = [
            await asyncio.gather(*(judge(engine, request) for request in requests))
            for engine, requests in zip(engines, by_view, strict=True)
        ]
        return stitch(settings, size, judged, keeps)

    def _keeps(self, settings: Settings) -> bool:
        """Whether reconstructions are kept; the nearest-neighbour method has none."""
        return self.settings.reconstructions and settings.method == "glad"

    def _result(self, model: Any, row: dict[str, Any], detection: Any) -> dict[str, Any]:
        threshold = self.memory.threshold if self.memory else model.settings.threshold_for(row["category"])
        full_size = detection.full_size or (model.settings.feature_resolution,) * 2
        anomaly_map = self._stored_map(model, detection.anomaly_map, full_size)
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
            "full_height": full_size[0],
            "full_width": full_size[1],
            "reconstruction": _png(detection.reconstruction) if self._keeps(model.settings) else None,
            "width": row["width"],
            "height": row["height"],
            "seconds": detection.seconds,
            "tiles": [asdict(tile) for tile in detection.tiles],
            "doubt": doubt_about(model.settings, row),
            "p_value": (self.memory or model).p_value(detection.score, row["category"]),
            "position": row["position"],
            "further": row["further"],
            "shard_pages": row["shard_pages"],
            "unjudged": row["unjudged"],
        }

    def _stored_map(self, model: Any, anomaly_map: np.ndarray, full_size: tuple[int, int]) -> np.ndarray:
        """The map as it is stored, float16: at full size if the user asked for it."""
        import torch

        from glad_core.scoring import full_size_map, full_size_only

        if self.settings.maps == "token" or full_size_only(model.settings):
            return anomaly_map
        full = full_size_map(torch.from_numpy(anomaly_map)[None].float(), model.settings, full_size)
        return full[0].numpy().astype(np.float16)


def _frames(image: pa.LargeBinaryScalar, settings: Any, size: tuple[int, int]) -> list[np.ndarray]:
    """The frames of a decoded picture in every view, uint8 [h, w, 3]; they share the row's memory."""
    pixels, frames, start = np.frombuffer(image.as_buffer(), np.uint8), [], 0
    for framing in settings.framings():
        height, width = framing.size(*size)
        end = start + height * width * 3
        frames.append(pixels[start:end].reshape(height, width, 3))
        start = end
    return frames


def _gpu_slots(share: float, resolution: int) -> int:
    """Images in flight that the actor's share of its GPU holds beside the weights that it has loaded."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    return gpu_slots(share * total, torch.cuda.memory_allocated(), resolution)


def _name() -> str:
    """The actor's id in Ray, which it keeps when it is started anew; empty outside of Ray."""
    import ray

    return ray.get_runtime_context().get_actor_id() or "" if ray.is_initialized() else ""


def _error(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in (*ERROR_COLUMNS, "position", "further", "shard_pages", "unjudged")}


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
