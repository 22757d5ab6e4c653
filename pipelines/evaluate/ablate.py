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
from pipelines.evaluate.datasets import read_dataset
from pipelines.evaluate.tables import COLUMNS, published, published_name, tally_results
from pipelines.models.find import local_bundle
from pipelines.runs.schema import COMPLETE, read_run
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
    settings = {which: _settings(place) for which, place in bundles.items()}
    if settings[True].resolution != settings[False].resolution:
        raise GladError(f"{model} and {plain} have different resolutions: train both from the same base")
    examples = read_dataset(dataset, storage)
    session.connect()
    values: dict[str, dict[str, list[float]]] = {}
    done: dict[tuple[bool, str], str] = {}
    for row in rows_of(settings[True]):
        for seed in seeds:
            # δ and T of the plain model are its own; everything else is alike.
            changed = settings[row.trained_with_anomalies].model_copy(update=row.changes)
            identity = f"{row.trained_with_anomalies}-{changed.model_dump_json()}-{seed}"
            run = out / "runs" / f"{len(done):02d}-seed{seed}"
            key = (row.trained_with_anomalies, identity)
            if key not in done:
                done[key] = str(run)
                console.print(f"{row.name}, seed {seed}", highlight=False)
                _run(dataset, category, bundles[row.trained_with_anomalies], changed, seed, run, storage)
            found = _metrics(done[key], examples, storage)
            for column in COLUMNS:
                values.setdefault(f"{row.table}: {row.name}", {}).setdefault(column, []).append(found[column])
    for table in _tables(values, published_name({example.category for example in examples})):
        console.print(table)
    _write(values, out)
    console.print(f"ablation.json and ablation.md in {out}", highlight=False)
    return values


def _settings(place: Path) -> Settings:
    return Settings.parse(read_description(place).settings, str(place))


def _run(
    dataset: str, category: str | None, base: Path, settings: Settings, seed: int, run: Path, storage: Storage
) -> None:
    """The scoring job with a bundle of other settings; nothing where the very same run is complete."""
    changed = run.with_name(f"{run.name}.bundle")
    shutil.rmtree(changed, ignore_errors=True)
    try:
        changed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(base, changed, copy_function=_link)
    except OSError as error:
        raise GladError(f"{changed}: {error.strerror or error}; choose another --out") from error
    model_id = update_settings(changed, settings, {})
    if (run / COMPLETE).exists():
        record = read_run(str(run), storage)
        if record["models"][""]["model_id"] == model_id and record["request"]["seed"] == seed:
            shutil.rmtree(changed)
            return
    request = ScoreRequest(dataset, str(run), model=str(changed), category=category, seed=seed, overwrite=True)
    score(request, Console(quiet=True))
    shutil.rmtree(changed)


def _link(source: str, target: str) -> None:
    """Weights are linked, not copied; glad.json is replaced as a whole, never written into."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _metrics(run: str, examples: list[Any], storage: Storage) -> dict[str, float]:
    """Averages over the run's categories."""
    tallies = tally_results(run, read_run(run, storage), examples, storage)
    found = [tally.metrics() for tally in tallies.values()]
    return {column: float(np.mean([of[column] for of in found])) for column in COLUMNS}


def _tables(values: dict[str, dict[str, list[float]]], dataset: str | None) -> list[Table]:
    paper = {row: of for table in published()["ablations"].values() for row, of in table.items()}
    tables = []
    for kind, title in (("components", "Table 3: components"), ("steps", "Table 4: fixed against adaptive steps")):
        table = Table("", "I-AUROC", "P-AUROC", "PRO", "paper, MVTec-AD: I-AUROC/P-AUROC", title=title)
        for name, of in values.items():
            which, _, row = name.partition(": ")
            if which == kind:
                table.add_row(row, *(_spread(of[column]) for column in ("I-AUROC", "P-AUROC", "PRO")), paper[row])
        tables.append(table)
    return tables


def _spread(values: list[float]) -> str:
    mean, deviation = 100 * float(np.mean(values)), 100 * float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{mean:.1f} ± {deviation:.1f}"


def _write(values: dict[str, dict[str, list[float]]], out: Path) -> None:
    (out / "ablation.json").write_text(json.dumps(values, indent=1) + "\n")
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(_spread(of[column]) for column in COLUMNS) + " |" for name, of in values.items()
    ]
    (out / "ablation.md").write_text("\n".join(lines) + "\n")
