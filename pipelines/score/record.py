"""What a scoring job leaves on record: its identity, run.json, and the table at its end."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as pads
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import StorageError, absolute, clear_errors
from glad_core.bundle.glad_json import Provenance, versions
from glad_core.bundle.settings import Method
from glad_core.engine.search import Search
from glad_core.errors import GladError
from pipelines.archive.uris import printable
from pipelines.models.find import Models
from pipelines.runs.query import DECIDED, margin
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS, RESULTS
from pipelines.score.actor_plan import ActorPlan
from pipelines.score.request import Counts, ScoreRequest

WORST = 5  # images that are named
MOST_READ = 1_000_000  # rows of a run whose results are read again for its end
PACKAGES = ("glad-ray", "ray", "torch", "diffusers", "timm", "pyarrow")


def identity(request: ScoreRequest, source: str, models: Models, searches: dict[str, Search]) -> dict[str, Any]:
    """Everything that decides the results: only a command with the same identity may resume a run.

    Args:
        source: the archive's absolute location.
        searches: how the stop step is searched for, by bundle.
    """
    fixed = ("category", "method", "good", "seed", "pages", "maps", "reconstructions", "precision", "compiled")
    return {
        "source": source,
        "models": {key: description.model_id for key, description in models.descriptions.items()},
        "search": searches,
    } | {name: getattr(request, name) for name in fixed}


def run_record(
    request: ScoreRequest,
    identity: dict[str, Any],
    run: Run,
    models: Models,
    actors: ActorPlan,
    counts: Counts,
    started: datetime,
    seconds: float,
) -> dict[str, Any]:
    """run.json: what was scored, with which settings, and what came of it."""
    judged_by = methods(models)
    own = request.good is None  # else the threshold is that of these good images, not the bundle's
    return {
        "schema_version": 3,
        "source": identity["source"],
        "out": run.location,
        "model": request.model,
        # By category; the key "" is the one bundle for all images.
        "models": {
            key: {"model_id": description.model_id, "category": description.category, "settings": description.settings}
            | {"method": judged_by[key], "search": identity["search"][key] if judged_by[key] == "glad" else None}
            | {"calibration": _calibration(description.provenance) if own else None}
            for key, description in models.descriptions.items()
        },
        "method": ", ".join(sorted(set(judged_by.values()))),
        "request": {"seed": request.seed, "batch_size": actors.slots, "maps": request.maps}
        | {
            "good": request.good and absolute(request.good),
            "reconstructions": request.reconstructions,
            "category": request.category,
            "max_errors": request.max_errors,
            "pages": request.pages,
        }
        | {"precision": request.precision, "compiled": request.compiled},
        "actors": asdict(actors),
        "counts": asdict(counts),
        "versions": versions(*PACKAGES),
        "host": os.uname().nodename,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def methods(models: Models) -> dict[str, Method]:
    """What judges, by the key of a bundle."""
    return {key: settings.method for key, settings in models.settings().items()}


def without_reconstructions(judged_by: dict[str, Method]) -> str | None:
    """A line that --reconstructions keeps none, or none of some categories; None if it keeps all."""
    nearest = [key for key, method in judged_by.items() if method == "nearest"]
    if not nearest:
        return None
    which = "" if len(nearest) == len(judged_by) else f" of {', '.join(nearest)}"
    return f"--reconstructions keeps none{which}: good patches judge here, and no picture is rebuilt"


def _calibration(provenance: Provenance) -> dict[str, Any] | None:
    """Number of good images and target false-positive rate behind the threshold, and why that may be too low; None if
    the bundle has no record.
    """
    images = provenance.get("calibration_images", provenance.get("held_out_images"))
    if images is None or "target_fpr" not in provenance:
        return None
    more = {"confidence": provenance.get("confidence"), "doubt": provenance.get("threshold_doubt")}
    return {"images": images, "target_fpr": provenance["target_fpr"], **more}


def print_end(location: str, counts: Counts, console: Console) -> None:
    """What ends the command after its table: the errors by kind, the most anomalous images, and what to do next."""
    run = Run.at(location)
    try:
        with clear_errors(location, run.storage):  # Arrow reads results, and gives up sooner than a job does
            lines = [*_errors_by_kind(run), *_worst(run)] if counts.scored + counts.errors <= MOST_READ else []
    except (GladError, StorageError) as error:
        lines = [f"the results cannot be read just now: {error}"]
    lines += _unlike_training(run, counts)
    lines.append(f"next: glad report {shlex.quote(location)}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _unlike_training(run: Run, counts: Counts) -> list[str]:
    """A line if far more images are anomalous than thresholds allow of good ones, as most of an archive are."""
    from glad_core.threshold import TARGET_FPR, far_more  # scipy takes a second, and only the end needs it

    rates = [TARGET_FPR] if run.record.get("request", {}).get("good") else []
    rates += [model["calibration"]["target_fpr"] for model in run.record["models"].values() if model.get("calibration")]
    if counts.anomalies is None or not rates or not far_more(counts.anomalies, counts.scored, max(rates)):
        return []
    return [
        f"{counts.anomalies} of {counts.scored} images are anomalous; of good ones the threshold allows "
        f"{max(rates):.1%}: if most of them look good, light, camera or product are not as in training; `glad drift` "
        "compares with an earlier run, and training or `glad calibrate` with such pictures mends it"
    ]


def _errors_by_kind(run: Run) -> list[str]:
    kinds = Counter(run.errors().to_table(columns=["error_type"])["error_type"].to_pylist())
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return [f"errors by kind: {named}; `uri` and `message` are in {run.path(ERRORS)}"] if named else []


def worst_images(run: Run, results: pads.Dataset) -> list[dict[str, Any]]:
    """Name, score, threshold and verdict of the most anomalous of these results of a complete run, at most `WORST`."""
    columns = {name: pads.field(name) for name in ("uri", "score", "threshold", "is_anomalous")}
    table = results.to_table(columns=columns | {"margin": margin(run)}, filter=DECIDED)
    most = pc.select_k_unstable(table, WORST, sort_keys=[("margin", "descending")])
    worst: list[dict[str, Any]] = table.select(list(columns)).take(most).to_pylist()
    return worst


def _worst(run: Run) -> list[str]:
    worst = worst_images(run, run.results())
    words = {True: "anomalous", False: "good", None: "no threshold"}
    rows = [f"  {row['score']:.4g}  {words[row['is_anomalous']]}  {printable(row['uri'])}" for row in worst]
    if len(rows) == 1:
        limit = worst[0]["threshold"]
        return [f"verdict:{rows[0]}" + ("" if limit is None else f"  (threshold {limit:.4g})")]
    return ["most anomalous, by score:", *rows] if rows else []


def print_counts(run: Run, counts: Counts, console: Console) -> None:
    """The table that ends a job, of a complete run."""
    table = Table(show_header=False)
    pages = f" and {counts.pages} further pages of them" if counts.pages else ""
    table.add_row("images", f"{counts.images}{pages}")
    anomalies = "- (the bundle has no threshold)" if counts.anomalies is None else str(counts.anomalies)
    table.add_row("anomalies", anomalies)
    table.add_row("errors", str(counts.errors) + (f" (see {run.path(ERRORS)})" if counts.errors else ""))
    if counts.doubtful:
        table.add_row("doubtful", f"{counts.doubtful} (the column 'doubt' of the results says why)")
    if counts.duplicates:
        table.add_row("listed twice", f"{counts.duplicates} (scored once)")
    if counts.blank:
        table.add_row("empty entries", f"{counts.blank} (of the list, without a URI)")
    if counts.left_out:
        table.add_row("left out", "\n".join(f"{count} {reason}" for reason, count in counts.left_out.items()))
    judged = run.record.get("judged", counts.images)  # by the job that completed the run
    table.add_row("images/s", f"{judged / max(run.record['seconds'], 1e-9):.2f}")
    table.add_row("results", escape(run.path(RESULTS)))
    console.print(table, highlight=False)
