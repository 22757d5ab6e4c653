"""`glad ablate`: the rows of the paper's Tables 3 and 4 for any dataset: what ADS, ATP and SAFF each bring.

Every row is the scoring job with other settings, once per seed; a run that is complete is not repeated.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster import session
from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description, update_settings
from glad_core.bundle.settings import Settings
from glad_core.calibration import STRIDE
from glad_core.errors import GladError
from pipelines.archive.layouts import read_dataset
from pipelines.evaluate.tables import COLUMNS, average, published
from pipelines.evaluate.tally import tally_results
from pipelines.models.find import local_bundle
from pipelines.runs.run import Run
from pipelines.runs.schema import COMPLETE
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, which of the two bundles, and what differs from that bundle's settings."""

    table: str
    name: str
    trained_with_anomalies: bool
    changes: dict[str, Any]


def rows_of(settings: Settings) -> list[Row]:
    """The paper's rows."""
    fixed = {"delta": 0.0}  # without a δ nothing is compared: plain DDIM from T

    def steps(start: int) -> dict[str, Any]:
        return fixed | {"start_step": start, "inference_steps": max(1, round(start / STRIDE))}

    return [
        Row("components", "Baseline (LDM)", False, fixed),
        Row("components", "+ ADS", False, {"saff": False}),
        Row("components", "+ ATP", True, fixed),
        Row("components", "+ ADS + ATP without SAFF", True, {"saff": False}),
        Row("components", "+ ADS + ATP with SAFF", True, {}),
        *(Row("steps", f"{start} fixed steps", True, steps(start)) for start in (350, 550, 750)),
        Row("steps", "adaptive steps", True, {}),
    ]


def ablate(
    dataset: str, category: str | None, model: str, plain: str, seeds: list[int], out: Path, console: Console
) -> dict[str, dict[str, list[float]]]:
    """Run every row with every seed, print both tables (mean ± standard deviation, per cent) and write them to ``out``.

    Args:
        model: bundle trained with synthetic anomalies (ATP).
        plain: the same base trained without (`glad train --no-anomalies`).

    Raises:
        GladError, StorageError, SessionError: no such dataset or bundle; bundles of different resolution.
    """
    storage = Storage.from_environment()
    bundles = {True: local_bundle(model, storage), False: local_bundle(plain, storage)}
    settings = {trained: _settings(bundle) for trained, bundle in bundles.items()}
    if settings[True].resolution != settings[False].resolution:
        raise GladError(f"{model} and {plain} have different resolutions: train both from the same base")
    examples = read_dataset(dataset, storage)
    session.connect()
    values: dict[str, dict[str, list[float]]] = {}
    runs: dict[str, Run] = {}  # by everything that decides the results: rows of both tables may share a run
    for row in rows_of(settings[True]):
        trained = row.trained_with_anomalies
        for seed in seeds:
            # The plain model keeps its own δ and T; everything else is alike.
            changed = settings[trained].model_copy(update=row.changes)
            identity = f"{trained}-{changed.model_dump_json()}-{seed}"
            if identity not in runs:
                console.print(f"{row.name}, seed {seed}", highlight=False)
                folder = str(out / "runs" / f"{len(runs):02d}-seed{seed}")
                _score(dataset, category, bundles[trained], changed, seed, Run.at(folder, storage))
                runs[identity] = Run.at(folder, storage)  # anew: a run remembers the record that it has read
            metrics = average([tally.metrics() for tally in tally_results(runs[identity], examples).values()])
            for column in COLUMNS:
                values.setdefault(f"{row.table}: {row.name}", {}).setdefault(column, []).append(metrics[column])
    for table in _tables(values):
        console.print(table)
    _write(values, out)
    console.print(f"ablation.json and ablation.md in {out}", highlight=False)
    return values


def _settings(bundle: Path) -> Settings:
    return Settings.parse(read_description(bundle).settings, str(bundle))


def _score(dataset: str, category: str | None, base: Path, settings: Settings, seed: int, run: Run) -> None:
    """Score with ``base`` under other settings; nothing to do if the very same run is complete."""
    changed = Path(f"{run.location}.bundle")
    shutil.rmtree(changed, ignore_errors=True)
    try:
        changed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(base, changed, copy_function=_link)
    except OSError as error:
        raise GladError(f"{changed}: {error.strerror or error}; choose another --out") from error
    model_id = update_settings(changed, settings, {})
    if run.has(COMPLETE):
        same_model = run.record["models"][""]["model_id"] == model_id
        if same_model and run.record["request"]["seed"] == seed:
            shutil.rmtree(changed)
            return
    request = ScoreRequest(dataset, run.location, model=str(changed), category=category, seed=seed, overwrite=True)
    score(request, Console(quiet=True))
    shutil.rmtree(changed)


def _link(source: str, target: str) -> None:
    """Weights are linked, not copied; glad.json is replaced as a whole, never written into."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _tables(values: dict[str, dict[str, list[float]]]) -> list[Table]:
    paper = {row: figures for table in published()["ablations"].values() for row, figures in table.items()}
    tables = []
    for kind, title in (("components", "Table 3: components"), ("steps", "Table 4: fixed against adaptive steps")):
        table = Table("", "I-AUROC", "P-AUROC", "PRO", "paper, MVTec-AD: I-AUROC/P-AUROC", title=title)
        for name, columns in values.items():
            table_name, _, row = name.partition(": ")
            if table_name == kind:
                table.add_row(row, *(_spread(columns[name]) for name in ("I-AUROC", "P-AUROC", "PRO")), paper[row])
        tables.append(table)
    return tables


def _spread(values: list[float]) -> str:
    mean, deviation = 100 * float(np.mean(values)), 100 * float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{mean:.1f} ± {deviation:.1f}"


def _write(values: dict[str, dict[str, list[float]]], out: Path) -> None:
    (out / "ablation.json").write_text(json.dumps(values, indent=1) + "\n")
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(_spread(row[column]) for column in COLUMNS) + " |" for name, row in values.items()
    ]
    (out / "ablation.md").write_text("\n".join(lines) + "\n")
