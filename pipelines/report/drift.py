"""`glad drift`: is one run's archive like another's? Score and stop-step distributions of two runs, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from scipy import stats

from cluster.storage import Storage, is_s3, join, local_path
from glad_core.errors import GladError
from glad_core.image_metrics import pooled_chi_squared
from pipelines.report.contact_sheet import save_figure
from pipelines.runs.schema import RESULTS, read_run

CATEGORIES_SHOWN = 12


def drift(
    first: str, second: str, out: Path | None, console: Console, *, alpha: float = 0.01
) -> dict[str, dict[str, Any]]:
    """Print and plot how two runs differ, by category; returns the same, with ``differs`` at level ``alpha``.

    Scores: two-sample Kolmogorov-Smirnov test. Stop steps: chi-squared test of their counts. With c categories every
    p-value is multiplied by 2c (Bonferroni), so a false alarm has probability ``alpha`` at most.

    Raises:
        GladError: no finished run, no category in both, or ``out`` cannot be written.
    """
    storage = Storage.from_environment()
    runs = [_columns(run, storage) for run in (first, second)]
    shared = sorted(set(runs[0]) & set(runs[1]))
    if not shared:
        raise GladError(f"{first} and {second} have no category in common: nothing to compare")
    table = Table("category", "images", "median score", "p (scores)", "p (stop steps)", "verdict")
    found: dict[str, dict[str, Any]] = {}
    for name in shared:
        a, b = runs[0][name], runs[1][name]
        p_scores = min(1.0, 2 * len(shared) * float(stats.ks_2samp(a["score"], b["score"]).pvalue))
        p_steps = min(1.0, 2 * len(shared) * pooled_chi_squared(a["step"], b["step"]))
        differs = min(p_scores, p_steps) < alpha
        medians = [float(np.median(of["score"])) for of in (a, b)]
        found[name] = {
            "images": [len(a["score"]), len(b["score"])],
            "median_score": medians,
            "p_scores": p_scores,
            "p_stop_steps": p_steps,
            "differs": differs,
        }
        table.add_row(
            name,
            f"{len(a['score'])} / {len(b['score'])}",
            f"{medians[0]:.3f} / {medians[1]:.3f}",
            f"{p_scores:.2g}",
            f"{p_steps:.2g}",
            "[red]differs[/red]" if differs else "alike",
        )
    console.print(table)
    if out is not None:
        _plot(runs, shared[:CATEGORIES_SHOWN], (first, second), out)
        console.print(f"plot in {out}", highlight=False)
    return found


def _columns(run: str, storage: Storage) -> dict[str, dict[str, np.ndarray]]:
    """Scores and stop steps (-1 for none) by category."""
    folder = run.rstrip("/") if is_s3(run) else local_path(run)
    read_run(folder, storage)
    filesystem, path = storage.resolve(join(folder, RESULTS))
    table = pads.dataset(path, filesystem=filesystem).to_table(columns=["category", "score", "stop_step"])
    names = np.array([name or "(none)" for name in table["category"].to_pylist()])
    score = table["score"].to_numpy()
    step = table["stop_step"].fill_null(-1).to_numpy()
    return {str(name): {"score": score[names == name], "step": step[names == name]} for name in np.unique(names)}


def _plot(runs: list[dict[str, dict[str, np.ndarray]]], shared: list[str], labels: tuple[str, str], out: Path) -> None:
    figure, axes = plt.subplots(len(shared), 2, figsize=(9, 2.6 * len(shared)), squeeze=False)
    for row, name in enumerate(shared):
        for column, what in enumerate(("score", "step")):
            values = [run[name][what] for run in runs]
            edges = np.histogram_bin_edges(np.concatenate(values), bins=40)
            for of_run, label in zip(values, labels, strict=True):
                axes[row, column].hist(of_run, bins=edges, density=True, alpha=0.5, label=label)
            axes[row, column].set_title(f"{name}: {'score' if what == 'score' else 'stop step'}", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, out)
