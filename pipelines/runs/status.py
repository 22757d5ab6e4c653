"""`glad status`: how far a run is, from any machine, by reading its output alone."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.storage import Storage, is_s3, join, local_path
from glad_core.errors import GladError
from pipelines.runs.commits import read_asked, read_commits, read_plan
from pipelines.runs.schema import COMPLETE


def status(dest: str, storage: Storage) -> dict[str, Any]:
    """What DEST says of its run.

    Returns:
        ``state`` (listing, unfinished or complete), ``images`` (None while listing), ``done``, ``anomalies``,
        ``errors``, ``shards`` committed and in all, and ``asked``. Whether somebody is at work on an unfinished run
        cannot be seen here; the same `glad score` command goes on with it.

    Raises:
        GladError: no run was started there.
    """
    out = dest.rstrip("/") if is_s3(dest) else local_path(dest)
    asked = read_asked(out, storage)
    if asked is None:
        raise GladError(f"{out}: no run was started there; name the --out of a `glad score`")
    plan, commits = read_plan(out, storage), read_commits(out, storage)
    complete = storage.kind(join(out, COMPLETE)) == "file"
    total = {name: sum(getattr(of, name) for of in commits.values()) for name in ("scored", "anomalies", "errors")}
    return {
        "state": "complete" if complete else "listing" if plan is None else "unfinished",
        "images": plan.images if plan else None,
        "done": total["scored"] + total["errors"],
        "anomalies": total["anomalies"],
        "errors": total["errors"],
        "shards": [len(commits), plan.shards if plan else None],
        "asked": asked,
    }


def show(dest: str, as_json: bool, console: Console) -> None:
    """Print the status as a table, or as one line of JSON."""
    found = status(dest, Storage.from_environment())
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    images = found["images"]
    share = f" of {images} ({found['done'] / images:.1%})" if images else ""
    table.add_row("state", found["state"])
    table.add_row("images done", f"{found['done']}{share}")
    table.add_row("anomalies", str(found["anomalies"]))
    table.add_row("errors", str(found["errors"]))
    table.add_row("source", found["asked"]["source"])
    table.add_row("model", ", ".join(sorted(set(found["asked"]["models"].values()))))
    console.print(table, highlight=False, markup=False)
