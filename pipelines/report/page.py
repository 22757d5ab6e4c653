"""`glad report`: one self-contained page about a run, and what `glad view` shows too.

`report` top to bottom: read the run, total all results as a stream, find the most anomalous, make their cards, write
the page. Only the numbers of all images and the rows of one file at a time are ever held.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.dataset as pads
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape

from cluster.storage import Storage, clear_errors, is_s3, join, local_path
from glad_core.errors import GladError
from pipelines.archive.decode import FETCH_THREADS
from pipelines.evaluate.datasets import read_dataset
from pipelines.report.cards import HeatScale, make_card
from pipelines.report.contact_sheet import places_of
from pipelines.report.truth import Truth, curves
from pipelines.runs.query import Place, Query, open_results, read_rows, search
from pipelines.runs.schema import COMPLETE, ERRORS, ERRORS_SCHEMA, read_run, settings_of

PAGE_BYTES = 24_000_000  # of a page, all pictures together; 1 MB less than promised, for everything else
PICTURE_SHARE = 0.9
ERRORS_SHOWN = 500
BINS = 60
CHUNK = 32  # rows whose maps and pictures are held at a time
TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Totals:
    """What is counted over all results."""

    scores: list[np.ndarray] = field(default_factory=list)  # in units of the threshold where there are several
    kinds: list[np.ndarray] = field(default_factory=list)  # index into KINDS of every score
    steps: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    kind_counts: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    thresholds: set[float | None] = field(default_factory=set)
    missed: list[tuple[float, str]] = field(default_factory=list)


KINDS = ("good", "anomalous", "correct", "false alarm", "miss", "hit")


def report(run_folder: str, out: Path, console: Console, *, dataset: str | None = None, top: int = 500) -> None:
    """Write the page about a finished run: the ``top`` most anomalous images, and totals over all.

    Args:
        dataset: ground truth, as `glad evaluate` reads it.

    Raises:
        GladError, StorageError, SessionError: no finished run, not its dataset, or ``out`` cannot be written.
    """
    storage = Storage.from_environment()
    folder = run_folder.rstrip("/") if is_s3(run_folder) else local_path(run_folder)
    run = read_run(folder, storage)
    examples = read_dataset(dataset, storage) if dataset is not None else None
    truth = Truth(examples) if examples is not None else None
    found = open_results(folder, storage)
    with clear_errors(folder, storage):
        totals = count(found, truth)
        page = summary(folder, run, totals, storage)
        _, places = search(found, Query(count=top))
        places = _with_misses(places, totals, found, top)
        most = int(PAGE_BYTES * PICTURE_SHARE / max(len(places), 1))
        with console.status("") as status:
            cards: list[dict[str, Any]] = []
            for start in range(0, len(places), CHUNK):
                cards += make_cards(folder, run, found, places[start : start + CHUNK], page["scale"], storage, most)
                status.update(f"{len(cards)} of {len(places)} images")
    if examples is not None and truth is not None:
        page["curves"] = curves(folder, run, examples, storage) if page["total"] else []
        for card in cards:
            card["truth"] = truth.verdict(card["uri"], card["anomalous"])
    text = render(page | {"cards": cards})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{os.getpid()}.part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise GladError(f"{out}: {error.strerror or error}; choose another --out") from error
    unread = sum(card["problem"] is not None for card in cards)
    if unread:
        console.print(f"[yellow]{unread} source images can no longer be read; their cards say why[/yellow]")
    shown = f"{len(cards)} of {page['total']} images in {escape(str(out))}, {len(text) / 1e6:.1f} MB"
    console.print(f"{shown}; open it in a browser", highlight=False, soft_wrap=True)


def count(found: pads.Dataset, truth: Truth | None = None) -> Totals:
    """One pass over the numbers of all results."""
    totals = Totals()
    wanted = ["score", "threshold", "is_anomalous", "stop_step", "stop_reason", "category", "model_id"]
    for batch in found.to_batches(columns=[*wanted, "uri", "image_id"] if truth else wanted):
        if not len(batch):
            continue
        column = {name: batch[name].to_pylist() for name in wanted[1:]}
        if truth is None:
            kinds = ["anomalous" if anomalous else "good" for anomalous in column["is_anomalous"]]
        else:
            verdicts = zip(batch["uri"].to_pylist(), column["is_anomalous"], strict=True)
            kinds = [truth.verdict(uri, anomalous) for uri, anomalous in verdicts]
            scored = zip(kinds, batch["score"].to_pylist(), batch["image_id"].to_pylist(), strict=True)
            totals.missed += [(score, image_id) for kind, score, image_id in scored if kind == "miss"]
        scores = batch["score"].to_numpy(zero_copy_only=False)
        limits = np.array([value or np.nan for value in column["threshold"]], np.float32)
        totals.scores.append(np.stack([scores, scores / limits]))
        totals.kinds.append(np.array([KINDS.index(kind) for kind in kinds], np.int8))
        totals.kind_counts.update(kinds)
        totals.steps.update(
            (step, reason or "none") for step, reason in zip(column["stop_step"], column["stop_reason"], strict=True)
        )
        totals.categories.update(name or "" for name in column["category"])
        totals.models.update(column["model_id"])
        totals.thresholds.update(column["threshold"])
    return totals


def summary(folder: str, run: dict[str, Any], totals: Totals, storage: Storage) -> dict[str, Any]:
    """Everything on the page but the cards."""
    several = len(totals.thresholds) > 1 and None not in totals.thresholds
    threshold = next(iter(totals.thresholds)) if len(totals.thresholds) == 1 else None
    scores = np.concatenate(totals.scores, axis=1) if totals.scores else np.empty((2, 0))
    kinds = np.concatenate(totals.kinds) if totals.kinds else np.empty(0, np.int8)
    plotted = scores[1] if several else scores[0]
    models = run["models"].items()
    heat = HeatScale.of(scores[0], threshold if threshold else _typical(totals.thresholds))
    anomalies = sum(totals.kind_counts[kind] for kind in ("anomalous", "hit", "false alarm"))
    return {
        "folder": folder,
        "source": run.get("source", ""),
        "method": run.get("method", "glad"),
        "started": run.get("started", ""),
        "ended": run.get("ended", ""),
        "seconds": run.get("seconds"),
        "host": run.get("host", ""),
        "versions": run.get("versions", {}),
        "models": [
            {"category": name, "id": of["model_id"], "settings": of["settings"], "calibration": of.get("calibration")}
            for name, of in models
        ],
        "model": run.get("model", ""),
        "total": len(plotted),
        "anomalies": None if totals.thresholds == {None} else anomalies,
        "kinds": dict(totals.kind_counts),
        "categories": dict(sorted(totals.categories.items())),
        "reasons": sorted({reason for _, reason in totals.steps}),
        "threshold": threshold,
        "unit": "score / threshold" if several else "score",
        "line": 1.0 if several else threshold,
        "histogram": _histogram(plotted, kinds),
        "steps": [{"step": s, "reason": r, "count": n} for (s, r), n in sorted(totals.steps.items(), key=str)],
        "scale": {"low": heat.low, "high": heat.high},
        "errors": _errors(folder, storage),
        "curves": [],
    }


def make_cards(
    folder: str,
    run: dict[str, Any],
    found: pads.Dataset,
    places: list[Place],
    scale: dict[str, float],
    storage: Storage,
    most_bytes: int,
) -> list[dict[str, Any]]:
    """The cards of these results, in their order."""
    rows = read_rows(found, places)
    sources = places_of(folder, [row["image_id"] for row in rows], storage)
    where = join(folder, COMPLETE)
    settings = [settings_of(run, row["category"], where) for row in rows]
    heat = HeatScale(**scale)
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        return list(
            pool.map(
                lambda row, of: make_card(row, sources.get(row["image_id"]), of, heat, storage, most_bytes),
                rows,
                settings,
            )
        )


def render(page: dict[str, Any], live: bool = False) -> str:
    """The page as HTML. ``live``: it asks its server for the cards instead of carrying them."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    # Ours and the vendored libraries', not data: they go into the page as they are.
    parts = {
        name: Markup((TEMPLATES / file).read_text(encoding="utf-8"))
        for name, file in {
            "style": "report.css",
            "script": "report.js",
            "d3": "vendor/d3.min.js",
            "plot": "vendor/plot.min.js",
        }.items()
    }
    title = page["source"].rstrip("/").rpartition("/")[2] or page["folder"]
    return templates.get_template("report.html.j2").render(page=page, live=live, title=title, **parts)


def _with_misses(places: list[Place], totals: Totals, found: pads.Dataset, top: int) -> list[Place]:
    """With ground truth the worst misses belong on the page as well, at most a fifth of it."""
    known = {place.image_id for place in places}
    missed = [image_id for _, image_id in sorted(totals.missed) if image_id not in known][: top // 5]
    if not missed:
        return places
    _, more = search(found, Query(count=500, ids=tuple(missed)))
    return [*places[: top - len(more)], *more]


def _typical(thresholds: set[float | None]) -> float | None:
    known = sorted(value for value in thresholds if value)
    return known[len(known) // 2] if known else None


def _histogram(scores: np.ndarray, kinds: np.ndarray) -> list[dict[str, Any]]:
    if not len(scores):
        return []
    edges = np.histogram_bin_edges(scores, bins=BINS)
    return [
        {"from": float(edges[bin_]), "to": float(edges[bin_ + 1]), "kind": KINDS[kind], "count": int(number)}
        for kind in np.unique(kinds)
        for bin_, number in enumerate(np.histogram(scores[kinds == kind], bins=edges)[0])
        if number
    ]


def _errors(folder: str, storage: Storage) -> dict[str, Any]:
    place = join(folder, ERRORS)
    if storage.kind(place) != "folder":
        return {"total": 0, "rows": [], "stages": {}}
    filesystem, path = storage.resolve(place)
    errors = pads.dataset(path, filesystem=filesystem, schema=ERRORS_SCHEMA)
    stages: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for batch in errors.to_batches():
        stages.update(
            f"{stage}: {kind}"
            for stage, kind in zip(*(batch[c].to_pylist() for c in ("stage", "error_type")), strict=True)
        )
        if len(rows) < ERRORS_SHOWN:
            rows += batch.slice(0, ERRORS_SHOWN - len(rows)).to_pylist()
    return {"total": sum(stages.values()), "rows": rows, "stages": dict(stages.most_common())}
