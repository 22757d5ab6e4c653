"""The actor of the scoring job: models loaded once, decoded rows in, `SCORED_SCHEMA` rows out in any order."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.storage import Storage
from pipelines.model_source import Models, local_bundle
from pipelines.results import SCORED_SCHEMA

KEPT_MODELS = 4  # bundles an actor holds at a time


@dataclass(frozen=True)
class ActorSettings:
    """What an actor needs to know; ``threads`` is its share of the machine's CPUs.

    With a ``memory`` (`pipelines.memory`) images are judged by it instead of by reconstruction.
    """

    models: Models
    storage: Storage
    seed: int
    maps: Literal["token", "full"]
    reconstructions: bool
    gpu: bool
    threads: int
    memory: str | None = None


class GladActor:
    """Callable for ``map_batches``; the inside of `_detect` is all that an in-flight engine would replace."""

    def __init__(self, settings: ActorSettings) -> None:
        self.settings = settings
        self.loaded: OrderedDict[str, Any] = OrderedDict()
        self.memory: Any = None
        self.failure: Exception | None = None
        try:
            self._prepare()
        except Exception as error:  # Ray would restart the actor for ever and bury the reason; the first call tells it
            self.failure = error

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self.failure is not None:
            raise self.failure
        decoded = {row["image_id"]: row for row in rows.to_pylist()}
        out = [self._error(row) for row in decoded.values() if row["error_type"] is not None]
        wanted: dict[str, dict[str, dict[str, Any]]] = {}
        for image_id, row in decoded.items():
            if row["error_type"] is not None:
                continue
            key = self.settings.models.key(row["category"])
            if key is None:
                known = ", ".join(self.settings.models.categories)
                message = f"no model for category '{row['category']}'; there are {known}"
                out.append(self._error(row | {"stage": "score", "error_type": "no_model", "message": message}))
            else:
                wanted.setdefault(key, {})[image_id] = row
        for key, group in wanted.items():
            out += self._detect(self._model(key), group)
        return pa.Table.from_pylist(out, schema=SCORED_SCHEMA)

    def _prepare(self) -> None:
        import torch

        torch.set_num_threads(self.settings.threads)
        # TF32 rounds differently for every batch shape; an image's score must not depend on its neighbours.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        if "" in self.settings.models.bundles:
            self._model("")
        if self.settings.memory is not None:
            from pipelines.memory import read_memory

            self.memory = read_memory(self.settings.memory, self.settings.storage)

    def _model(self, key: str) -> Any:
        """A loaded bundle; an archive comes category by category, so a few of them kept are enough."""
        import torch

        from glad_core.bundle import load_bundle

        if key not in self.loaded:
            if len(self.loaded) == KEPT_MODELS:
                self.loaded.popitem(last=False)
            path = local_bundle(self.settings.models.bundles[key], self.settings.storage)
            device = "cuda" if self.settings.gpu else "cpu"
            self.loaded[key] = load_bundle(path, device=device, dtype=torch.float32)
        self.loaded.move_to_end(key)
        return self.loaded[key]

    def _detect(self, model: Any, rows: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One output row per input row. A batch that fails is tried again image by image, to lose only the culprit."""
        from glad_core.detect import Request, detect
        from glad_core.nearest import detect_nearest

        side = model.settings.resolution
        requests = [
            Request(image_id, np.frombuffer(row["image"], np.uint8).reshape(side, side, 3), row["category"])
            for image_id, row in rows.items()
        ]
        try:
            if self.memory is not None:
                found = list(detect_nearest(model, self.memory.patches, requests))
            else:
                found = list(detect(model, requests, self.settings.seed))
        except Exception as error:
            self._die_with_the_device()
            if len(rows) > 1:
                for image_id, row in rows.items():
                    yield from self._detect(model, {image_id: row})
                return
            reason = " ".join(str(error).split())[:500]
            for row in rows.values():
                yield self._error(row | {"stage": "score", "error_type": type(error).__name__, "message": reason})
            return
        for detection in found:
            yield self._result(model, rows[detection.image_id], detection)

    def _die_with_the_device(self) -> None:
        """A GPU that no longer answers takes its process along; Ray starts another actor and gives it the rows."""
        if not self.settings.gpu:
            return
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)

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
        }

    def _map(self, model: Any, anomaly_map: np.ndarray) -> np.ndarray:
        import torch

        from glad_core.detect import full_size_map, full_size_only

        if self.settings.maps == "token" or full_size_only(model):
            return anomaly_map
        full = full_size_map(torch.from_numpy(anomaly_map)[None].float(), model.settings)
        return full[0].numpy().astype(np.float16)

    @staticmethod
    def _error(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in ("image_id", "uri", "stage", "error_type", "message")}


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
