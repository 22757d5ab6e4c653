"""`glad report`: one self-contained HTML page about a run. `glad view` serves the same page.

`report` is the whole job: count all results, find the most anomalous, make their cards, write the page. It holds the
numbers of all images, but pictures of no more than `CHUNK` at a time.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.dataset as pads
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape

from cluster import session
from cluster.storage import absolute, clear_errors
from pipelines.archive.fetch import FETCH_THREADS
from pipelines.archive.layouts import read_dataset
from pipelines.report.cards import STOP_REASONS, HeatScale, make_card
from pipelines.report.totals import Totals, count
from pipelines.report.truth import Truth, curves
from pipelines.runs.query import Query, ResultKey, read_rows, search
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS

PAGE_BYTES = 24_000_000  # of a page with all its pictures: 1 MB below the size that docs/report.md promises
PICTURE_SHARE = 0.9  # of the page's bytes
MISS_SHARE = 5  # at most one in so many cards is a miss that is not among the most anomalous
ERRORS_SHOWN = 500
CHUNK = 32  # cards made at a time
TEMPLATES = Path(__file__).parent / "templates"
PARTS = {"style": "report.css", "script": "report.js", "d3": "vendor/d3.min.js", "plot": "vendor/plot.min.js"}


def report(
    run_folder: str,
    out: str,
    console: Console,
    *,
    dataset: str | None = None,
    top: int = 500,
    address: str | None = None,
) -> None:
    """Write the page about a finished run: the ``top`` most anomalous images, and totals over all.

    Args:
        out: HTML page, local or s3://.
        dataset: ground truth, as for `glad evaluate`, with which Ray compares the results.
        address: Ray cluster to do that; None starts Ray on this machine.

    Raises:
        GladError, StorageError, SessionError: no finished run, not its dataset, or ``out`` cannot be written.
    """
    run = Run.at(run_folder)
    results = run.results()
    truth = Truth(read_dataset(dataset, run.storage)) if dataset is not None else None
    with clear_errors(run.location, run.storage):
        totals = count(run, results, truth)
        page = summary(run, totals)
        chosen = _most_anomalous(run, results, totals, top)
        cards = _make_all_cards(run, results, chosen, page["scale"], console)
    if truth is not None and dataset is not None:
        session.connect(address, reads=[run.location, absolute(dataset)])
        page["curves"] = curves(run, truth.examples) if page["total"] else []
        for card in cards:
            called = truth.verdict(card["uri"], card["anomalous"])
            card["truth"] = called if card["decided"] else "undecided"
    text = render(page | {"cards": cards})
    run.storage.write(absolute(out), text.encode())  # in one go: an interrupted command leaves no half page
    unreadable = sum(card["problem"] is not None for card in cards)
    if unreadable:
        console.print(f"[yellow]{unreadable} source images can no longer be read; their cards say why[/yellow]")
    if page["undecided"]:
        console.print(f"[yellow]{page['undecided']} results have no finite score: undecided[/yellow]")
    contents = f"{len(cards)} of {page['total']} images in {escape(out)}, {len(text) / 1e6:.1f} MB"
    console.print(f"{contents}; open it in a browser", highlight=False, soft_wrap=True)


def summary(run: Run, totals: Totals) -> dict[str, Any]:
    """Everything on the page except the cards."""
    scale = totals.heat_scale()
    return _about(run) | {
        "total": sum(totals.kind_counts.values()),
        "anomalies": totals.called_anomalous,
        "undecided": totals.kind_counts["undecided"],
        "kinds": dict(totals.kind_counts),
        "categories": dict(sorted(totals.categories.items())),
        "reasons": sorted({reason for _, reason in totals.steps}),
        "stop_reasons": STOP_REASONS,
        "threshold": totals.threshold,
        "unit": _unit(run) if totals.several_thresholds else "score",
        "line": 1.0 if totals.several_thresholds else totals.threshold,
        "histogram": totals.histogram(),
        "steps": [
            {"step": step, "reason": reason, "count": number}
            for (step, reason), number in sorted(totals.steps.items(), key=str)
        ],
        "scale": {"low": scale.low, "high": scale.high},
        "errors": _errors(run),
        "curves": [],
    }


def _unit(run: Run) -> str:
    """Of the margins in the histogram, if scores alone do not compare."""
    return "score / threshold" if not run.standardised else "margin (1: the threshold)"


def make_cards(
    run: Run, results: pads.Dataset, chosen: list[ResultKey], scale: dict[str, float], most_bytes: int
) -> list[dict[str, Any]]:
    """The cards of the chosen results, in their order; ``most_bytes`` are the pictures of one."""
    rows = read_rows(results, chosen)
    manifest = run.manifest_rows([row["image_id"] for row in rows])
    heat = HeatScale(**scale)

    def card(row: dict[str, Any]) -> dict[str, Any]:
        return make_card(run, row, manifest.get(row["image_id"]), heat, most_bytes)

    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        return list(pool.map(card, rows))


def render(page: dict[str, Any], live: bool = False) -> str:
    """The page as HTML. A ``live`` page loads its cards from its server instead of carrying them."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    # Not escaped: these are our own files and libraries, not data.
    parts = {name: Markup((TEMPLATES / file).read_text(encoding="utf-8")) for name, file in PARTS.items()}
    title = page["source"].rstrip("/").rpartition("/")[2] or page["folder"]
    return templates.get_template("report.html.j2").render(page=page, live=live, title=title, **parts)


def _most_anomalous(run: Run, results: pads.Dataset, totals: Totals, top: int) -> list[ResultKey]:
    """The ``top`` most anomalous results; the last ones make room for the worst misses, if ground truth shows any."""
    _, chosen = search(run, results, Query(count=top))
    shown = {result.image_id for result in chosen}
    misses = [image_id for _, image_id in sorted(totals.misses) if image_id not in shown][: top // MISS_SHARE]
    if not misses:
        return chosen
    _, missed = search(run, results, Query(count=500, ids=tuple(misses)))
    return [*chosen[: top - len(missed)], *missed]


def _make_all_cards(
    run: Run, results: pads.Dataset, chosen: list[ResultKey], scale: dict[str, float], console: Console
) -> list[dict[str, Any]]:
    most_bytes = int(PAGE_BYTES * PICTURE_SHARE / max(len(chosen), 1))
    cards: list[dict[str, Any]] = []
    with console.status("") as status:
        for start in range(0, len(chosen), CHUNK):
            cards += make_cards(run, results, chosen[start : start + CHUNK], scale, most_bytes)
            status.update(f"{len(cards)} of {len(chosen)} images")
    return cards


def _about(run: Run) -> dict[str, Any]:
    """What was scored, when, and with which models."""
    record = run.record
    of_bundles = [model["settings"].get("method") for model in record["models"].values()]
    return {
        "folder": run.location,
        "source": record.get("source", ""),
        # Of older versions the bundles know better.
        "method": "nearest" if set(of_bundles) == {"nearest"} else record.get("method", "glad"),
        "started": record.get("started", ""),
        "ended": record.get("ended", ""),
        "seconds": record.get("seconds"),
        "host": record.get("host", ""),
        "versions": record.get("versions", {}),
        "model": record.get("model", ""),
        "models": [
            {
                "category": category,
                "id": model["model_id"],
                "settings": model["settings"],
                "calibration": model.get("calibration"),
            }
            for category, model in record["models"].items()
        ],
    }


def _errors(run: Run) -> dict[str, Any]:
    """The images that were not judged: how many, how many by kind, and the first of them."""
    if not run.has(ERRORS, "folder"):
        return {"total": 0, "rows": [], "stages": {}}
    stages: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for batch in run.errors().to_batches():
        kinds = zip(batch["stage"].to_pylist(), batch["error_type"].to_pylist(), strict=True)
        stages.update(f"{stage}: {kind}" for stage, kind in kinds)
        if len(rows) < ERRORS_SHOWN:
            rows += batch.slice(0, ERRORS_SHOWN - len(rows)).to_pylist()
    return {"total": sum(stages.values()), "rows": rows, "stages": dict(stages.most_common())}
