"""`glad demo`: draws a dataset, scores it, and makes the metrics, the contact sheet and the report."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console

from pipelines.demo.boards import make_demo_data
from pipelines.evaluate.tables import evaluate
from pipelines.report.contact_sheet import show
from pipelines.report.page import report
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest


def demo(out: Path, console: Console) -> None:
    """Fill ``out`` with data/, run/, sheet.png, report.html and metrics.json; print the metrics and where to look."""
    started = time.perf_counter()
    dataset, run, sheet, page = (
        str(make_demo_data(out / "data")),
        str(out / "run"),
        out / "sheet.png",
        out / "report.html",
    )
    counts = score(ScoreRequest(dataset, run, "small", reconstructions=True, overwrite=True), console)
    (metrics,) = evaluate(run, dataset, console).values()
    show(run, 20, str(sheet), console)
    report(run, str(page), Console(quiet=True), dataset=dataset)
    summary = {
        "i_auroc": metrics["I-AUROC"],
        "p_auroc": metrics["P-AUROC"],
        "images": counts.images,
        "errors": counts.errors,
        "seconds": time.perf_counter() - started,
    }
    (out / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = (
        f"{counts.anomalies} of {counts.images} boards called anomalous; AUROC (1 is perfect, 0.5 is chance): "
        f"images {metrics['I-AUROC']:.3f}, pixels {metrics['P-AUROC']:.3f}",
        f"open this in a browser:  {page.resolve().as_uri()}",
        f"or look at one picture:  {sheet}",
    )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
