"""The folder of a run, the --out of a `glad score`: what is in it and how to read it.

results/      Parquet, one row per judged image (`RESULTS_SCHEMA`); a category's rows in a folder of its name
errors/       Parquet, one row per image that was not judged (`ERRORS_SCHEMA`)
manifest/     Parquet, the archive as it was listed
run.json      settings, counts, versions; written last, so its presence says that the run is complete
started.json, plan.json, commits/    which shards are finished (`pipelines.runs.commits`)
feedback/     people's verdicts on results (`pipelines.runs.feedback`)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from cluster.storage import Storage, absolute, clear_errors, join
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.runs.schema import COMPLETE, ERRORS, ERRORS_SCHEMA, MANIFEST, RESULTS, RESULTS_SCHEMA, STARTED


@dataclass(frozen=True)
class Run:
    """A run folder at ``location``, absolute, local or s3://. Can be pickled, so that tasks read it as well."""

    location: str
    storage: Storage

    @classmethod
    def at(cls, location: str, storage: Storage | None = None) -> Run:
        """The run folder that a user named; it need not exist.

        Raises:
            StorageError: an unknown kind of location.
        """
        return cls(absolute(location), storage or Storage.from_environment())

    def patient(self) -> Run:
        """The same run with `Storage.patient`."""
        return replace(self, storage=self.storage.patient())

    def path(self, *names: str) -> str:
        """The location of something in the folder."""
        return join(self.location, *names)

    def has(self, name: str, kind: str = "file") -> bool:
        """Whether the folder holds a ``file`` or ``folder`` of that name."""
        return self.storage.kind(self.path(name)) == kind

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json of a finished run, read once.

        Raises:
            GladError: no finished run there, or run.json is damaged.
        """
        if not self.has(COMPLETE):
            if self.has(STARTED):
                raise GladError(f"{self.location}: this run is not finished; the same `glad score` command resumes it")
            raise GladError(f"{self.location}: no finished run there (no {COMPLETE}); name the --out of a `glad score`")
        try:
            return {"models": {}, "counts": {}} | json.loads(self.storage.read(self.path(COMPLETE)))
        except (ValueError, TypeError) as error:
            raise GladError(f"{self.path(COMPLETE)}: damaged; score again") from error

    def results(self) -> pads.Dataset:
        """The results of a finished run, as `RESULTS_SCHEMA`; files of no commit have been swept by then.

        Raises:
            GladError: as `record`. StorageError: storage cannot be used.
        """
        _ = self.record
        return self._dataset(RESULTS, RESULTS_SCHEMA)

    def errors(self) -> pads.Dataset:
        """The images that were not judged, as `ERRORS_SCHEMA`. Raises as `results`."""
        _ = self.record
        return self._dataset(ERRORS, ERRORS_SCHEMA)

    def manifest_rows(self, image_ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """The manifest rows of these images by image id: where to read them again, tar members included."""
        ids = pa.array(image_ids, pa.string())  # typed, since it may be empty
        table = self._dataset(MANIFEST, None).to_table(filter=pads.field("image_id").isin(ids))
        return {row["image_id"]: row for row in table.to_pylist()}

    def settings_of(self, category: str | None) -> Settings:
        """The settings that images of this category were scored with.

        Raises:
            GladError: run.json names no model for the category, or its settings are not ours.
        """
        models = self.record["models"]
        model = models.get("", models.get(category))
        if model is None:
            raise GladError(f"{self.path(COMPLETE)}: names no model for category '{category}'; score again")
        return Settings.parse(model["settings"], self.path(COMPLETE))

    def full_map(self, row: dict[str, Any]) -> np.ndarray:
        """A result's anomaly map at full size, float32 [D, D]; one of token resolution is enlarged as for the score."""
        settings = self.settings_of(row["category"])
        shape = (row["map_height"], row["map_width"])
        anomaly_map = np.asarray(row["anomaly_map"], np.float32).reshape(shape)
        if shape == (settings.feature_resolution, settings.feature_resolution):
            return anomaly_map
        import torch  # not at the top: it takes seconds, which a list of results does not need

        from glad_core.scoring import full_size_map

        return full_size_map(torch.from_numpy(anomaly_map)[None], settings)[0].numpy()

    def _dataset(self, name: str, schema: pa.Schema | None) -> pads.Dataset:
        filesystem, path = self.storage.resolve(self.path(name))
        with clear_errors(self.location, self.storage):
            return pads.dataset(path, filesystem=filesystem, schema=schema)
