"""`glad ablate`: the rows of the paper's Tables 3 and 4 for any dataset: what ADS, ATP and SAFF each bring.

Every row is the scoring job with other settings, once per seed; a run that is complete is not repeated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster import session
from cluster.storage import Storage, absolute, join
from glad_core.bundle.glad_json import Description, with_settings
from glad_core.bundle.settings import Settings
from glad_core.calibrated_steps import STRIDE
from glad_core.errors import GladError
from pipelines.archive.layouts import read_dataset
from pipelines.evaluate.tables import COLUMNS, average, published
from pipelines.evaluate.tally import tally_results
from pipelines.models.find import bundle_location, describe
from pipelines.models.variant import write_variant
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
    dataset: str,
    category: str | None,
    model: str,
    plain: str,
    seeds: list[int],
    out: str,
    console: Console,
    address: str | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Run every row with every seed, print both tables (mean ± standard deviation, per cent) and write them to ``out``.

    Args:
        model: bundle trained with synthetic anomalies (ATP).
        plain: the same base trained without (`glad train --no-anomalies`).
        out: folder, local or s3://.
        address: Ray cluster; None starts Ray on this machine.

    Raises:
        GladError, StorageError, SessionError: no such dataset or bundle; bundles of different resolution.
    """
    storage = Storage.from_environment()
    out = absolute(out)
    bundles = {True: bundle_location(model), False: bundle_location(plain)}
    descriptions = {trained: describe(bundle, storage) for trained, bundle in bundles.items()}
    settings = {trained: Settings.parse(known.settings, bundles[trained]) for trained, known in descriptions.items()}
    if settings[True].resolution != settings[False].resolution:
        raise GladError(f"{model} and {plain} have different resolutions: train both from the same base")
    examples = read_dataset(dataset, storage)
    session.connect(address, reads=[*bundles.values(), absolute(dataset)], writes=[out])
    values: dict[str, dict[str, list[float]]] = {}
    runs: dict[str, Run] = {}  # by everything that decides the results: rows of both tables may share a run
    for row in rows_of(settings[True]):
        trained = row.trained_with_anomalies
        for seed in seeds:
            # The plain model keeps its own δ and T; everything else is alike.
            changed = settings[trained].model_copy(update={"method": "glad"} | row.changes)
            identity = f"{trained}-{changed.model_dump_json()}-{seed}"
            if identity not in runs:
                console.print(f"{row.name}, seed {seed}", highlight=False)
                folder = join(out, "runs", f"{len(runs):02d}-seed{seed}")
                description = with_settings(descriptions[trained], changed, {})
                variant = f"{folder}.bundle"
                request = ScoreRequest(dataset, folder, variant, category, seed=seed, address=address, overwrite=True)
                _score(request, bundles[trained], description, storage)
                runs[identity] = Run.at(folder, storage)
            metrics = average([tally.metrics() for tally in tally_results(runs[identity], examples).values()])
            for column in COLUMNS:
                values.setdefault(f"{row.table}: {row.name}", {}).setdefault(column, []).append(metrics[column])
    for table in _tables(values):
        console.print(table)
    _write(values, out, storage)
    console.print(f"ablation.json and ablation.md in {out}", highlight=False)
    return values


def _score(request: ScoreRequest, base: str, description: Description, storage: Storage) -> None:
    """Score with the weights of ``base`` as ``description`` says; nothing to do if the very same run is complete."""
    run = Run.at(request.out, storage)
    if run.has(COMPLETE):
        same_model = run.record["models"][""]["model_id"] == description.model_id
        if same_model and run.record["request"]["seed"] == request.seed:
            return
    storage.delete_folder(request.model)  # of a killed command
    write_variant(base, description, request.model, storage, linked=True)
    score(request, Console(quiet=True))
    storage.delete_folder(request.model)


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


def _write(values: dict[str, dict[str, list[float]]], out: str, storage: Storage) -> None:
    storage.write(join(out, "ablation.json"), (json.dumps(values, indent=1) + "\n").encode())
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(_spread(row[column]) for column in COLUMNS) + " |" for name, row in values.items()
    ]
    storage.write(join(out, "ablation.md"), ("\n".join(lines) + "\n").encode())
