"""`glad status`: how far a run is, from any machine, by reading the run folder alone."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from glad_core.errors import GladError
from pipelines.runs.claim import find
from pipelines.runs.commits import is_complete, read_commits
from pipelines.runs.run import Run
from pipelines.runs.schema import MANIFEST


def status(run: Run) -> dict[str, Any]:
    """How far the run in a folder is.

    Returns:
        ``state`` (listing, unfinished or complete), ``images`` (None while listing), ``done``, ``anomalies``,
        ``errors``, ``shards`` (committed, all) and ``asked`` (everything that decides the results; None while listing).
        An unfinished run may be at work or not: the folder does not say. The same `glad score` command resumes it.

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
    }


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
    if current["asked"] is not None:
        table.add_row("source", current["asked"]["source"])
        table.add_row("model", ", ".join(sorted(set(current["asked"]["models"].values()))))
    console.print(table, highlight=False, markup=False)
