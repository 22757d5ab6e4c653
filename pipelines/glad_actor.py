"""The actor of the scoring job: a model loaded once, decoded rows in, `SCORED_SCHEMA` rows out in any order."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.storage import Storage
from pipelines.model_source import local_bundle
from pipelines.results import SCORED_SCHEMA


@dataclass(frozen=True)
class ActorSettings:
    """What an actor needs to know; ``threads`` is its share of the machine's CPUs."""

    model: str
    storage: Storage
    seed: int
    maps: Literal["token", "full"]
    reconstructions: bool
    gpu: bool
    threads: int


class GladActor:
    """Callable for ``map_batches``; the inside of `_detect` is all that an in-flight engine would replace."""

    def __init__(self, settings: ActorSettings) -> None:
        self.settings = settings
        self.failure: Exception | None = None
        try:
            self.model = self._load()
        except Exception as error:  # Ray would restart the actor for ever and bury the reason; the first call tells it
            self.failure = error

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self.failure is not None:
            raise self.failure
        decoded = {row["image_id"]: row for row in rows.to_pylist()}
        out = [self._error(row) for row in decoded.values() if row["error_type"] is not None]
        wanted = {image_id: row for image_id, row in decoded.items() if row["error_type"] is None}
        out += self._detect(wanted)
        return pa.Table.from_pylist(out, schema=SCORED_SCHEMA)

    def _load(self) -> Any:
        import torch

        from glad_core.bundle import load_bundle

        torch.set_num_threads(self.settings.threads)
        # TF32 rounds differently for every batch shape; an image's score must not depend on its neighbours.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        path = local_bundle(self.settings.model, self.settings.storage)
        return load_bundle(path, device="cuda" if self.settings.gpu else "cpu", dtype=torch.float32)

    def _detect(self, rows: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One output row per input row. A batch that fails is tried again image by image, to lose only the culprit."""
        from glad_core.detect import Request, detect

        side = self.model.settings.resolution
        requests = [
            Request(image_id, np.frombuffer(row["image"], np.uint8).reshape(side, side, 3))
            for image_id, row in rows.items()
        ]
        try:
            found = list(detect(self.model, requests, self.settings.seed))
        except Exception as error:
            self._die_with_the_device()
            if len(rows) > 1:
                for image_id, row in rows.items():
                    yield from self._detect({image_id: row})
                return
            reason = " ".join(str(error).split())[:500]
            for row in rows.values():
                yield self._error(row | {"stage": "score", "error_type": type(error).__name__, "message": reason})
            return
        for detection in found:
            yield self._result(rows[detection.image_id], detection)

    def _die_with_the_device(self) -> None:
        """A GPU that no longer answers takes its process along; Ray starts another actor and gives it the rows."""
        if not self.settings.gpu:
            return
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)

    def _result(self, row: dict[str, Any], detection: Any) -> dict[str, Any]:
        threshold = self.model.settings.threshold
        anomaly_map = self._map(detection.anomaly_map)
        return {
            "image_id": row["image_id"],
            "uri": row["uri"],
            "category": row["category"] or self.model.category,
            "model_id": self.model.model_id,
            "score": detection.score,
            "threshold": threshold,
            "is_anomalous": None if threshold is None else bool(np.float32(detection.score) > np.float32(threshold)),
            "stop_step": detection.stop_step,
            "stop_reason": detection.stop_reason,
            "steps": [{"timestep": timestep, "score": score} for timestep, score in detection.steps],
            "anomaly_map": anomaly_map.ravel(),
            "map_height": anomaly_map.shape[0],
            "map_width": anomaly_map.shape[1],
            "reconstruction": _png(detection.reconstruction) if self.settings.reconstructions else None,
            "width": row["width"],
            "height": row["height"],
            "seconds": detection.seconds,
        }

    def _map(self, anomaly_map: np.ndarray) -> np.ndarray:
        import torch

        from glad_core.detect import full_size_map, full_size_only

        if self.settings.maps == "token" or full_size_only(self.model):
            return anomaly_map
        full = full_size_map(torch.from_numpy(anomaly_map)[None].float(), self.model.settings)
        return full[0].numpy().astype(np.float16)

    @staticmethod
    def _error(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in ("image_id", "uri", "stage", "error_type", "message")}


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
