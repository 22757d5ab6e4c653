"""Finding results of a run by filter, sort and page: deciding columns are scanned, only the rows asked for are read."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import BaseModel, ConfigDict, Field

from cluster.storage import Storage, clear_errors, join
from pipelines.archive.decode import FETCH_THREADS
from pipelines.runs.schema import RESULTS, RESULTS_SCHEMA

HELD = 65_536  # candidates kept before the worst are dropped

# How far an image is above its threshold, so that categories with thresholds of their own compare; where a run has
# none, the score.
_above = pc.divide(pads.field("score"), pads.field("threshold"))
MARGIN = pc.coalesce(_above, pads.field("score"))
SORTS = {
    "margin": (MARGIN, "descending"),
    "margin_up": (MARGIN, "ascending"),
    "step": (pc.coalesce(pads.field("stop_step"), pa.scalar(-1, pa.int16())), "descending"),
    "name": (pads.field("uri"), "ascending"),
    "seconds": (pads.field("seconds"), "descending"),
}


class Query(BaseModel):
    """Which results, in which order. ``low`` and ``high`` bound the score; ``first``, ``count``: the page."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = ""
    category: str = ""
    verdict: Literal["", "anomalous", "good"] = ""
    reason: str = ""
    mark: Literal["", "confirmed", "false_alarm", "unmarked"] = ""
    low: float | None = None
    high: float | None = None
    ids: tuple[str, ...] = ()
    sort: Literal["margin", "margin_up", "step", "name", "seconds"] = "margin"
    first: int = Field(0, ge=0)
    count: int = Field(60, ge=1, le=500)


class Place(BaseModel):
    """Where a result is: its file and its id."""

    file: str
    image_id: str


def open_results(folder: str, storage: Storage) -> pads.Dataset:
    """The results of a finished run; what was not committed has been swept by then."""
    filesystem, path = storage.resolve(join(folder, RESULTS))
    with clear_errors(folder, storage):
        return pads.dataset(path, filesystem=filesystem, schema=RESULTS_SCHEMA)


def search(dataset: pads.Dataset, query: Query, marks: dict[str, str] | None = None) -> tuple[int, list[Place]]:
    """How many results fit, and where those of the page are, in order; ties by image id.

    Args:
        marks: image id to what a person said of it (`pipelines.runs.feedback`).
    """
    key, order = SORTS[query.sort]
    columns = {"key": key, "image_id": pads.field("image_id")}
    wanted = query.first + query.count
    keys = [("key", order), ("image_id", "descending")]

    def best(parts: list[pa.RecordBatch]) -> pa.Table:
        table = pa.Table.from_batches(parts).combine_chunks()
        return table.take(pc.select_k_unstable(table, min(wanted, len(table)), sort_keys=keys))

    total, held, parts = 0, 0, []
    for part in dataset.scanner(columns=columns, filter=_filter(query, marks or {})).scan_batches():
        batch = part.record_batch
        if not len(batch):
            continue
        total += len(batch)
        held += len(batch)
        parts.append(batch.append_column("file", pa.array([part.fragment.path] * len(batch), pa.string())))
        if held > max(HELD, 4 * wanted):
            parts = best(parts).to_batches()
            held = wanted
    if total == 0:
        return 0, []
    page = best(parts).slice(query.first).to_pylist()
    return total, [Place(file=row["file"], image_id=row["image_id"]) for row in page]


def read_rows(dataset: pads.Dataset, places: list[Place], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows at these places, in their order, whole or some columns; one file at a time in each thread."""
    by_file: dict[str, list[str]] = {}
    for place in places:
        by_file.setdefault(place.file, []).append(place.image_id)
    fragments = {part.path: part for part in dataset.get_fragments() if part.path in by_file}

    def read(file: str) -> list[dict[str, Any]]:
        wanted = pads.field("image_id").isin(by_file[file])
        return fragments[file].to_table(schema=dataset.schema, columns=columns, filter=wanted).to_pylist()

    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        rows = {row["image_id"]: row for part in pool.map(read, by_file) for row in part}
    return [rows[place.image_id] for place in places]


def _filter(query: Query, marks: dict[str, str]) -> pc.Expression | None:
    parts = []
    if query.text:
        parts.append(pc.match_substring(pads.field("uri"), query.text, ignore_case=True))
    if query.category:
        parts.append(pads.field("category") == query.category)
    if query.verdict:
        anomalous = pc.coalesce(pads.field("is_anomalous"), pa.scalar(False))
        parts.append(anomalous if query.verdict == "anomalous" else ~anomalous)
    if query.reason:
        parts.append(pads.field("stop_reason") == query.reason)
    if query.low is not None:
        parts.append(pads.field("score") >= query.low)
    if query.high is not None:
        parts.append(pads.field("score") <= query.high)
    if query.ids:
        parts.append(pads.field("image_id").isin(list(query.ids)))
    if query.mark:
        parts.append(_marked(query.mark, marks))
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


def _marked(mark: str, marks: dict[str, str]) -> pc.Expression:
    ids: Collection[str] = [name for name, said in marks.items() if mark in (said, "unmarked")]
    found = pads.field("image_id").isin(pa.array(ids, pa.string()))
    return ~found if mark == "unmarked" else found
