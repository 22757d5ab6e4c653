"""`glad drift`: whether two runs differ, by the distributions of their scores and stop steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from cluster.storage import Storage, clear_errors
from glad_core.errors import GladError
from glad_core.image_metrics import pooled_chi_squared
from pipelines.report.figures import save_figure
from pipelines.runs.run import Run

CATEGORIES_SHOWN = 12  # in the plot
NO_STEP = -1  # stop step of a result that has none
TITLES = {"score": "score", "step": "denoising step at the stop"}

Columns = dict[str, np.ndarray]  # "score" float32 [N] and "step" int16 [N] of one category


def drift(
    first: str, second: str, out: str | None, console: Console, *, alpha: float = 0.01
) -> dict[str, dict[str, Any]]:
    """Print, plot and return how two runs differ, by category.

    Args:
        first, second: folders of finished runs.
        out: PNG file, local or s3://, with both distributions; None writes none.
        alpha: accepted probability that runs over like images are reported to differ in any category.

    Raises:
        GladError: no finished run, no category in both. StorageError: ``out`` cannot be written.
    """
    columns = []
    for folder in (first, second):
        read, undecided = read_columns(Run.at(folder))
        columns.append(read)
        if undecided:
            console.print(
                f"[yellow]{folder}: {undecided} results have no finite score: left out[/yellow]", highlight=False
            )
    shared = sorted(set(columns[0]) & set(columns[1]))
    if not shared:
        raise GladError(f"{first} and {second} have no category in common: nothing to compare")
    comparison = {name: compare(columns[0][name], columns[1][name], 2 * len(shared), alpha) for name in shared}
    console.print(_table(comparison, alpha))
    if out is not None:
        save_figure(_histograms(columns, shared[:CATEGORIES_SHOWN], (first, second)), out, Storage.from_environment())
        console.print(f"plot in {out}", highlight=False)
    return comparison


def compare(one: Columns, other: Columns, tests: int, alpha: float) -> dict[str, Any]:
    """Numbers of images, median scores and p-values of two runs' results of a category, and whether they differ.

    Scores: two-sample Kolmogorov-Smirnov test. Stop steps: chi-squared test of their counts. Each p-value is multiplied
    by the number of all ``tests`` made (Bonferroni), so ``alpha`` bounds the false alarms of all of them together.
    """
    p_scores = min(1.0, tests * float(stats.ks_2samp(one["score"], other["score"]).pvalue))
    p_steps = min(1.0, tests * pooled_chi_squared(one["step"], other["step"]))
    return {
        "images": [len(one["score"]), len(other["score"])],
        "median_score": [float(np.median(one["score"])), float(np.median(other["score"]))],
        "p_scores": p_scores,
        "p_stop_steps": p_steps,
        "differs": min(p_scores, p_steps) < alpha,
    }


def read_columns(run: Run) -> tuple[dict[str, Columns], int]:
    """Scores and stop steps of a finished run by category, and the number of results without a finite score."""
    results = run.results()
    with clear_errors(run.location, run.storage):
        whole = results.to_table(columns=["category", "score", "stop_step"])
    table = whole.filter(pc.is_finite(whole["score"]))
    names = np.array([name or "(none)" for name in table["category"].to_pylist()])
    score = table["score"].to_numpy()
    step = table["stop_step"].fill_null(NO_STEP).to_numpy()
    kept = {str(name): {"score": score[names == name], "step": step[names == name]} for name in np.unique(names)}
    return kept, len(whole) - len(table)


def _table(comparison: dict[str, dict[str, Any]], alpha: float) -> Table:
    columns = ("category", "images", "median score", "p (scores)", "p (stop steps)", "verdict")
    meaning = f"p: probability of such a difference by chance; runs differ if it is below {alpha:g}"
    table = Table(*columns, caption=meaning)
    for name, row in comparison.items():
        table.add_row(
            escape(name),
            " / ".join(map(str, row["images"])),
            " / ".join(f"{median:.3f}" for median in row["median_score"]),
            f"{row['p_scores']:.2g}",
            f"{row['p_stop_steps']:.2g}",
            "[red]differs[/red]" if row["differs"] else "alike",
        )
    return table


def _histograms(columns: list[dict[str, Columns]], categories: list[str], labels: tuple[str, str]) -> Figure:
    figure = Figure(figsize=(9, 2.6 * len(categories)))
    axes = figure.subplots(len(categories), 2, squeeze=False)
    for row, name in enumerate(categories):
        for axis, (column, title) in zip(axes[row], TITLES.items(), strict=True):
            values = [run[name][column] for run in columns]
            edges = np.histogram_bin_edges(np.concatenate(values), bins=40)
            for run_values, label in zip(values, labels, strict=True):
                axis.hist(run_values, bins=edges, density=True, alpha=0.5, label=label)
            axis.set_title(f"{name}: {title}", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    return figure
