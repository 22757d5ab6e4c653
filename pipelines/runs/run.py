"""The folder of a run, the --out of a `glad score`: what is in it and how to read it.

results/      Parquet, one row per judged image (`RESULTS_SCHEMA`); a category's rows in a folder of its name
errors/       Parquet, one row per image that was not judged (`ERRORS_SCHEMA`)
manifest/     Parquet, the archive as it was listed
run.json      settings, counts, versions; put there last, so its presence says that the run is complete
plan.json, commits/, staging/, record.json    the run's books (`pipelines.runs.claim`, `pipelines.runs.commits`)
feedback/     people's verdicts on results (`pipelines.runs.feedback`)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from cluster.storage import Storage, absolute, clear_errors, join
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.runs.schema import (
    COMPLETE,
    ERRORS,
    ERRORS_SCHEMA,
    FILE,
    MANIFEST,
    PLAN,
    RESULTS,
    RESULTS_SCHEMA,
)


@dataclass(frozen=True)
class Run:
    """A run folder at ``location``, local or s3://, kept absolute. Can be pickled, so that tasks read it as well."""

    location: str
    storage: Storage = field(default_factory=Storage.from_environment)

    def __post_init__(self) -> None:
        object.__setattr__(self, "location", absolute(self.location))

    @classmethod
    def at(cls, location: str, storage: Storage | None = None) -> Run:
        """The run folder that a user named; it need not exist.

        Raises:
            StorageError: an unknown kind of location.
        """
        return cls(location, storage or Storage.from_environment())

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
        data = self.storage.read_all([self.path(COMPLETE)])[0]
        if data is None:
            if self.has(f"{PLAN}.json"):
                raise GladError(f"{self.location}: this run is not finished; the same `glad score` command resumes it")
            raise GladError(f"{self.location}: no finished run there (no {COMPLETE}); name the --out of a `glad score`")
        record = parse_record(data)
        if record is None:
            raise GladError(f"{self.path(COMPLETE)}: damaged; give the same `glad score` command again")
        return {"models": {}, "counts": {}} | record

    def results(self) -> pads.Dataset:
        """The results of a finished run, as `RESULTS_SCHEMA`.

        Raises:
            GladError: as `record`; also if files have been deleted, changed or added since.
            StorageError: storage cannot be used.
        """
        self._check_files()
        return self._dataset(RESULTS, RESULTS_SCHEMA)

    def errors(self) -> pads.Dataset:
        """The images that were not judged, as `ERRORS_SCHEMA`. Raises as `results`."""
        self._check_files()
        return self._dataset(ERRORS, ERRORS_SCHEMA)

    def manifest_rows(self, image_ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """The manifest rows of these images by image id: where to read them again, tar members included.

        Of a further page of a file, whose id is FILE-PAGE, the row has the number of the ``page`` as well.

        Raises:
            GladError: as `record`; also if the manifest is gone or damaged.
            StorageError: storage cannot be used.
        """
        if not image_ids:
            return {}
        parts = {image_id: image_id.partition("-") for image_id in image_ids}
        files = pa.array({file for file, _, _ in parts.values()}, pa.string())
        # Runs of before `glad score --new` have one listing.
        names = self.record.get("listings") or [self.record.get("listing", "")]
        try:
            with clear_errors(self.path(MANIFEST), self.storage):
                manifest = pads.dataset([self._dataset(join(MANIFEST, name), None) for name in names])
                rows = manifest.to_table(filter=pads.field("image_id").isin(files))
        except pa.ArrowInvalid as error:
            raise GladError(
                f"{self.path(MANIFEST)}: gone or damaged, so the run's images cannot be found; restore this folder, "
                "or score again with --overwrite"
            ) from error
        by_file = {row["image_id"]: row for row in rows.to_pylist()}
        return {
            image_id: by_file[file] | {"page": int(page) if page else None}
            for image_id, (file, _, page) in parts.items()
            if file in by_file
        }

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

    @cached_property
    def standardised(self) -> frozenset[str]:
        """The keys of the models whose scores are in spreads of good pictures (several views), 0 a usual good one."""
        models = self.record["models"].items()
        return frozenset(key for key, model in models if len(model["settings"].get("views") or ()) > 1)

    def full_map(self, row: dict[str, Any]) -> np.ndarray:
        """A result's anomaly map at full size, float32 [h, w]; one of token resolution is enlarged as for the score."""
        settings = self.settings_of(row["category"])
        shape = (row["map_height"], row["map_width"])
        full = [row.get(name) for name in ("full_height", "full_width")]
        # Results of before 0.2 have none; in NumPy's columns that is NaN.
        height, width = (settings.feature_resolution if side is None or side != side else int(side) for side in full)
        size = (height, width)
        anomaly_map = np.asarray(row["anomaly_map"], np.float32).reshape(shape)
        if shape == size:
            return anomaly_map
        import torch  # not at the top: it takes seconds, which a list of results does not need

        from glad_core.scoring import full_size_map

        return full_size_map(torch.from_numpy(anomaly_map)[None], settings, size)[0].numpy()

    def problem_of_files(self, record: dict[str, Any]) -> str | None:
        """What is wrong with the files of results/ and errors/, if they are not those that run.json counted."""
        for name, expected in record.get("files", {}).items():  # older versions counted none
            sizes = [size for _, size in self._parts(name)]
            if {"files": len(sizes), "bytes": sum(sizes)} != expected:
                return (
                    f"{self.path(name)} holds {len(sizes)} files of {sum(sizes)} bytes in all, but {COMPLETE} counts "
                    f"{expected['files']} of {expected['bytes']}: files have been deleted, changed or added; "
                    "the same `glad score` command mends it"
                )
        return None

    def _check_files(self) -> None:
        problem = self.problem_of_files(self.record)
        if problem is not None:
            raise GladError(problem)

    def _parts(self, name: str) -> list[tuple[str, int]]:
        """Our files in a folder and their bytes; what else lies there, such as Thumbs.db, is not ours."""
        if not self.has(name, "folder"):
            return []
        files = self.storage.walk(self.path(name))
        return [(file, size) for file, size in files if FILE.fullmatch(f"{RESULTS}/{file}")]

    def _dataset(self, name: str, schema: pa.Schema | None) -> pads.Dataset:
        filesystem, path = self.storage.resolve(self.path(name))
        with clear_errors(self.location, self.storage):
            files = [f"{path}/{file}" for file, _ in self._parts(name)]
            return pads.dataset(files, filesystem=filesystem, schema=schema, format="parquet")


def parse_record(data: bytes) -> dict[str, Any] | None:
    """The bytes of run.json as a dict; None if they are damaged."""
    try:
        record = json.loads(data)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def generation_of(record: dict[str, Any] | None) -> int:
    """The generation that completed a run; 0 for a damaged record, or one of an older version."""
    generation = (record or {}).get("generation")
    return generation if isinstance(generation, int) else 0
