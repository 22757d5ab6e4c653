"""`glad status`: how far a run is, from any machine, by reading the run folder alone."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from glad_core.errors import GladError
from pipelines.runs.claim import find
from pipelines.runs.commits import Written, is_complete, read_commits
from pipelines.runs.run import Run
from pipelines.runs.schema import MANIFEST

LATEST = 50  # commits that the rate is taken from
SILENT = 900.0  # seconds without a commit, or ten times as long as those images usually take: perhaps nothing works


def status(run: Run) -> dict[str, Any]:
    """How far the run in a folder is.

    Returns:
        ``state`` (listing, unfinished or complete), ``images`` (None while listing), ``done``, ``anomalies``,
        ``errors``, ``shards`` (committed, all), ``asked`` (everything that decides the results; None while listing),
        and of an unfinished run ``last_progress`` (ISO 8601, UTC), ``images_per_second`` of late and ``seconds_left``;
        None if they cannot be known. An unfinished run may be at work or not: the folder does not say. The same
        `glad score` command resumes it.

    Raises:
        GladError: no run was started there.
    """
    found = find(run)
    plan = found.plan
    if plan is None and not (found.generation or run.has(MANIFEST, "folder")):
        raise GladError(f"{run.location}: no run was started there; name the --out of a `glad score`")
    if plan is None and found.generation:
        raise GladError(f"{run.location}: the plan of this run is damaged, or an older version wrote it")
    commits = read_commits(run, plan) if plan else {}
    totals = {
        name: sum(getattr(commit, name) for commit in commits.values()) for name in ("done", "anomalies", "errors")
    }
    return {
        "state": "listing" if plan is None else "complete" if is_complete(run, plan) else "unfinished",
        "images": plan.images if plan else None,
        "done": totals["done"],
        "anomalies": totals["anomalies"],
        "errors": totals["errors"],
        "shards": [len(commits), plan.shards if plan else None],
        "asked": plan.identity if plan else None,
    } | _pace(commits.values(), plan.images - totals["done"] if plan else 0)


def _pace(commits: Collection[Written], left: int) -> dict[str, Any]:
    """``last_progress``, ``images_per_second`` and ``seconds_left``, by the times of the last commits."""
    latest = sorted((commit.at, commit.done) for commit in commits if commit.at)[-LATEST:]
    pace: dict[str, Any] = dict.fromkeys(("last_progress", "images_per_second", "seconds_left"))
    if not latest or not left:
        return pace
    pace["last_progress"] = datetime.fromtimestamp(latest[-1][0], UTC).isoformat(timespec="seconds")
    seconds = latest[-1][0] - latest[0][0]
    if seconds > 0:
        rate = sum(done for _, done in latest[1:]) / seconds
        pace |= {"images_per_second": rate, "seconds_left": left / rate if rate else None}
    return pace


def print_status(location: str, as_json: bool, console: Console) -> None:
    """Print the status as a table, or as one line of JSON."""
    current = status(Run.at(location))
    if as_json:
        print(json.dumps(current))
        return
    images = current["images"]
    share = f" of {images} ({current['done'] / images:.1%})" if images else ""
    table = Table(show_header=False)
    table.add_row("state", current["state"])
    table.add_row("images done", f"{current['done']}{share}")
    table.add_row("anomalies", str(current["anomalies"]))
    table.add_row("errors", str(current["errors"]))
    if current["last_progress"] is not None:
        table.add_row("last progress", _ago(current))
    if current["seconds_left"] is not None:
        table.add_row("rate", f"{current['images_per_second']:.2f} images/s")
        table.add_row("time left", f"{timedelta(seconds=round(current['seconds_left']))}")
    if current["asked"] is not None:
        table.add_row("source", current["asked"]["source"])
        table.add_row("model", ", ".join(sorted(set(current["asked"]["models"].values()))))
    console.print(table, highlight=False, markup=False)


def _ago(current: dict[str, Any]) -> str:
    """When the last images were committed, and whether that is so long ago that no job may be at work."""
    last = datetime.fromisoformat(current["last_progress"])
    seconds = (datetime.now(UTC) - last).total_seconds()
    shard = current["done"] / max(1, current["shards"][0])
    usual = shard / current["images_per_second"] if current["images_per_second"] else 0.0
    words = f"{timedelta(seconds=max(0, round(seconds)))} ago"
    if seconds < max(SILENT, 10 * usual):
        return words
    return f"{words}: its job may have ended; the same `glad score` command resumes it"
