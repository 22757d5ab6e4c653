"""Searching a run's results by filter, sort order and page.

Only the columns that decide are scanned. Whole rows are read for one page alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import and_
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import BaseModel, ConfigDict, Field

from pipelines.runs.run import Run

Sort = Literal["margin", "margin_up", "step", "name", "seconds"]
HELD = 65_536  # candidates kept before the worst are dropped
READERS = 8  # files read at a time

# Runs of older versions may hold scores that are no finite numbers: such results are undecided, last in every order.
DECIDED = pc.is_finite(pads.field("score")) & pc.is_finite(pc.coalesce(pads.field("threshold"), pa.scalar(0.0)))
NO_NUMBER = pa.scalar(None, pa.float32())
_SCORE, _THRESHOLD = pads.field("score"), pads.field("threshold")


def ratio(run: Run) -> pc.Expression:
    """Score / threshold; null where that means nothing: standardised scores, a threshold of 0 or less, or none."""
    names = pa.array(run.standardised, pa.string())
    standardised = pc.scalar(True) if "" in run.standardised else pads.field("category").isin(names)
    means = pc.coalesce(DECIDED & (_THRESHOLD > 0) & ~standardised, pa.scalar(False))
    return pc.if_else(means, pc.divide(_SCORE, _THRESHOLD), NO_NUMBER)


def margin(run: Run) -> pc.Expression:
    """By which all results compare, above 1 for an alarm: the ratio, else 1 and the score's distance to its threshold.

    The score itself in a run without threshold; null if undecided.
    """
    distance = pc.add(pc.subtract(_SCORE, _THRESHOLD), pa.scalar(1, pa.float32()))
    return pc.if_else(DECIDED, pc.coalesce(ratio(run), distance, _SCORE), NO_NUMBER)


def order(run: Run, sort: Sort) -> tuple[pc.Expression, str]:
    """The key by which results are sorted, and in which direction."""
    return {
        "margin": (margin(run), "descending"),
        "margin_up": (margin(run), "ascending"),
        "step": (pc.coalesce(pads.field("stop_step"), pa.scalar(-1, pa.int16())), "descending"),
        "name": (pads.field("uri"), "ascending"),
        "seconds": (pads.field("seconds"), "descending"),
    }[sort]


def is_decided(score: float | None, threshold: float | None = None) -> bool:
    """Whether a result's score, and threshold if it has one, are finite: else nothing is known of the image."""
    return score is not None and math.isfinite(score) and (threshold is None or math.isfinite(threshold))


class Query(BaseModel):
    """Which results, in which order. ``low`` and ``high`` bound the score; ``first`` and ``count`` choose the page."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = ""
    category: str = ""
    verdict: Literal["", "anomalous", "good"] = ""
    reason: str = ""
    mark: Literal["", "confirmed", "false_alarm", "marked", "unmarked"] = ""
    low: float | None = None
    high: float | None = None
    ids: tuple[str, ...] = ()
    sort: Sort = "margin"
    first: int = Field(0, ge=0)
    count: int = Field(60, ge=1, le=500)


class ResultKey(BaseModel):
    """Where a result is stored: its file and its image id."""

    file: str
    image_id: str


def search(
    run: Run, results: pads.Dataset, query: Query, marks: dict[str, str] | None = None
) -> tuple[int, list[ResultKey]]:
    """Number of results that match, and where those of the page are stored, in order; ties by image id.

    Args:
        results: `Run.results`.
        marks: people's verdicts by image id (`pipelines.runs.feedback`).
    """
    key, direction = order(run, query.sort)
    columns = {"key": key, "image_id": pads.field("image_id")}
    end = query.first + query.count
    sort_keys = [("key", direction), ("image_id", "descending")]

    def best(batches: list[pa.RecordBatch]) -> pa.Table:
        table = pa.Table.from_batches(batches).combine_chunks()
        return table.take(pc.select_k_unstable(table, min(end, len(table)), sort_keys=sort_keys))

    total, held, batches = 0, 0, []
    for tagged in results.scanner(columns=columns, filter=condition(query, marks or {})).scan_batches():
        batch = tagged.record_batch
        if not len(batch):
            continue
        total += len(batch)
        held += len(batch)
        batches.append(batch.append_column("file", pa.array([tagged.fragment.path] * len(batch), pa.string())))
        if held > max(HELD, 4 * end):
            batches = best(batches).to_batches()
            held = end
    if total == 0:
        return 0, []
    page = best(batches).slice(query.first).to_pylist()
    return total, [ResultKey(file=row["file"], image_id=row["image_id"]) for row in page]


def read_rows(results: pads.Dataset, keys: list[ResultKey], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows stored there, in that order, whole or some columns.

    Raises:
        KeyError: no such result.
    """
    ids_by_file: dict[str, list[str]] = {}
    for key in keys:
        ids_by_file.setdefault(key.file, []).append(key.image_id)
    fragments = {fragment.path: fragment for fragment in results.get_fragments() if fragment.path in ids_by_file}

    def read(file: str) -> list[dict[str, Any]]:
        chosen = pads.field("image_id").isin(ids_by_file[file])
        return fragments[file].to_table(schema=results.schema, columns=columns, filter=chosen).to_pylist()

    with ThreadPoolExecutor(READERS) as pool:
        rows = {row["image_id"]: row for part in pool.map(read, ids_by_file) for row in part}
    return [rows[key.image_id] for key in keys]


def condition(query: Query, marks: dict[str, str]) -> pc.Expression | None:
    """What results have to fulfil to match a query; None if all do. ``marks`` as in `search`."""
    conditions = []
    if query.text:
        conditions.append(pc.match_substring(pads.field("uri"), query.text, ignore_case=True))
    if query.category:
        conditions.append(pads.field("category") == query.category)
    if query.verdict:
        anomalous = pc.coalesce(pads.field("is_anomalous"), pa.scalar(False))
        conditions += [DECIDED, anomalous if query.verdict == "anomalous" else ~anomalous]
    if query.reason:
        conditions.append(pads.field("stop_reason") == query.reason)
    if query.low is not None:
        conditions.append(pads.field("score") >= query.low)
    if query.high is not None:
        conditions.append(pads.field("score") <= query.high)
    if query.ids:
        conditions.append(pads.field("image_id").isin(list(query.ids)))
    if query.mark:
        conditions.append(_marked(query.mark, marks))
    return reduce(and_, conditions) if conditions else None


def _marked(mark: str, marks: dict[str, str]) -> pc.Expression:
    """Results with this mark, with any (``marked``), or without (``unmarked``)."""
    ids: Collection[str] = [image_id for image_id, verdict in marks.items() if mark in (verdict, "marked", "unmarked")]
    marked = pads.field("image_id").isin(pa.array(ids, pa.string()))
    return ~marked if mark == "unmarked" else marked
