"""The images of a run that an export writes: their results, names, and the regions of their alarms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
from contourpy import FillType, contour_generator
from scipy import ndimage

from cluster.locations import UNSPEAKABLE
from pipelines.archive.sources import WILDCARDS
from pipelines.archive.uris import path_of, split_tar_uri
from pipelines.runs.query import is_decided
from pipelines.runs.run import Run

BATCH = 32  # results held at a time: their maps may be large
THREADS = 4
UNREAD = ("reconstruction", "steps", "tiles")  # columns that no export needs
LONGEST = 120  # bytes of a name in the name of a mask
EIGHT = np.ones((3, 3), bool)  # neighbours that touch at a corner belong together


@dataclass(frozen=True)
class Region:
    """Part of a picture whose heat map is above the threshold.

    Attributes:
        rings: its outline, then those of its holes, [N, 2] each: x and y in pixels of the picture, not closed.
        score: the largest value of the map in it.
    """

    rings: list[np.ndarray]
    score: float


@dataclass(frozen=True)
class Judged:
    """A result, and what exports say of it."""

    run: Run
    row: dict[str, Any]  # as `RESULTS_SCHEMA`, without `UNREAD`

    @property
    def is_decided(self) -> bool:
        return is_decided(self.row["score"], self.row["threshold"])

    @property
    def is_alarm(self) -> bool:
        """Whether it was called anomalous by finite numbers."""
        return bool(self.row["is_anomalous"]) and self.is_decided

    @property
    def category(self) -> str:
        return self.row["category"] or "product"

    @property
    def score(self) -> float | None:
        """None if it is no finite number, which JSON lacks."""
        return self.row["score"] if is_decided(self.row["score"]) else None

    @property
    def threshold(self) -> float | None:
        """None if it has none, or one that is no finite number."""
        return self.row["threshold"] if is_decided(self.row["threshold"]) else None

    @property
    def is_standardised(self) -> bool:
        """Whether its score is in spreads of good pictures, 0 a usual good one."""
        return bool({"", self.row["category"]} & self.run.standardised)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, pixels."""
        return self.row["width"], self.row["height"]

    @cached_property
    def map(self) -> np.ndarray:
        """Its map at full size, float32 [h, w]; 0 where an older version wrote no finite number."""
        return np.nan_to_num(self.run.full_map(self.row), nan=0, posinf=0, neginf=0)

    @cached_property
    def regions(self) -> list[Region]:
        """Of an alarm, where the map is above the threshold; of every other image none."""
        return regions(self.map, self.row["threshold"], self.size) if self.is_alarm else []

    @property
    def name(self) -> str:
        """Its path within the run's source, with that of its tar before it; elsewhere the URI."""
        return name_in(self.run.record.get("source", ""), self.row["uri"])

    @property
    def file(self) -> str:
        """The name of a file about it, without suffix: safe on every disk, and no other image's."""
        stem = re.sub(r"[^\w.-]", "_", PurePosixPath(path_of(self.row["uri"])).stem).lstrip(".")
        stem = stem.encode()[:LONGEST].decode(errors="ignore")
        return f"{stem}-{self.row['image_id']}"


def judged(run: Run, results: pads.Dataset, matching: pc.Expression | None) -> Iterator[Judged]:
    """The results that match, in the order in which they are stored."""
    columns = [name for name in results.schema.names if name not in UNREAD]
    batches = results.scanner(
        columns=columns, filter=matching, batch_size=BATCH, batch_readahead=2, fragment_readahead=2
    ).to_batches()
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in batches:
            # Arrays, not lists: thousands of Python numbers for every image would take most of the time.
            maps = [found.values.to_numpy(zero_copy_only=False) for found in batch["anomaly_map"]]
            rows = batch.drop_columns("anomaly_map").to_pylist()
            images = [Judged(run, row | {"anomaly_map": found}) for row, found in zip(rows, maps, strict=True)]
            list(pool.map(attrgetter("regions"), images))  # kept by the image; most of the work, and free of Python
            yield from images


def name_in(source: str, uri: str) -> str:
    """The path of an image within ``source``; its URI if it lies elsewhere, or if no text can hold the path."""
    parts = split_tar_uri(uri)
    path = f"{parts[1]}/{parts[0]}" if parts else path_of(uri)
    wild = WILDCARDS.search(source)
    root = (
        source[: wild.start()].rpartition("/")[0] if wild and not path.startswith(f"{source}/") else source.rstrip("/")
    )
    inside = path.removeprefix(f"{root}/") if root else path
    if parts and parts[1] == source:  # the source is the tar
        inside = parts[0]
    return uri if UNSPEAKABLE.search(inside) else inside


def regions(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Region]:
    """The connected parts of a picture where its map is above the threshold.

    Args:
        anomaly_map: float [h, w], covers the picture.
        size: width and height of the picture, pixels.
    """
    if not (anomaly_map > threshold).any():
        return []
    # The edge is repeated, and below the threshold beyond it: outlines end at the picture's edge.
    padded = np.pad(np.pad(anomaly_map, 1, mode="edge"), 1, constant_values=min(0.0, threshold) - 1)
    # Only the part in which the regions lie, with a border: it is most often small.
    (top, bottom), (left, right) = (
        (found[0] - 1, found[-1] + 2) for found in (np.flatnonzero((padded > threshold).any(axis)) for axis in (1, 0))
    )
    padded = padded[top:bottom, left:right]
    labels, count = ndimage.label(padded > threshold, EIGHT)
    highest, inside = np.full(count + 1, threshold, np.float32), labels > 0
    np.maximum.at(highest, labels[inside], padded[inside])
    scale = np.array(size) / anomaly_map.shape[::-1]
    found = []
    shapes = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(threshold, np.inf)
    for points, offsets in zip(*shapes, strict=True):
        x, y = points.T  # of an outline, each point lies on a line between two values of the map
        near = labels[
            [np.floor(y).astype(int), np.ceil(y).astype(int)], [np.floor(x).astype(int), np.ceil(x).astype(int)]
        ]
        score = highest[near].max()
        outlines = np.split(
            np.clip((points + np.array([left - 1.5, top - 1.5])) * scale, 0, size), offsets[1:-1].astype(int)
        )
        rings = [ring[:-1] for ring in outlines if len(ring) > 3]  # the last point is the first
        if rings and len(outlines[0]) > 3:
            found.append(Region(rings, float(score)))
    return found
