"""`glad demo`: data, scoring job, figures, contact sheet and report in one go."""

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
    """Fill ``out`` with data/, run/, sheet.png, report.html and metrics.json, and print the tables and I-AUROC."""
    started = time.perf_counter()
    folder = make_demo_data(out / "data", 0)
    run = out / "run"
    counts = score(ScoreRequest(str(folder), str(run), reconstructions=True, overwrite=True), console)
    (found,) = evaluate(str(run), str(folder), console).values()
    show(str(run), 20, out / "sheet.png", console)
    page = out / "report.html"
    report(str(run), page, Console(quiet=True), dataset=str(folder))
    summary = {
        "i_auroc": found["I-AUROC"],
        "p_auroc": found["P-AUROC"],
        "images": counts.images,
        "errors": counts.errors,
        "seconds": time.perf_counter() - started,
    }
    (out / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = (
        f"{counts.anomalies} of {counts.images} boards called anomalous; "
        f"I-AUROC {found['I-AUROC']:.3f}, P-AUROC {found['P-AUROC']:.3f}",
        f"open this in a browser:  {page.resolve().as_uri()}",
        f"or look at one picture:  {out / 'sheet.png'}",
    )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
