"""`glad evaluate`: the paper's tables from a run's results and a dataset's ground truth."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

from cluster import session
from cluster.storage import Storage, absolute, join
from pipelines.archive.examples import Example
from pipelines.archive.layouts import read_dataset
from pipelines.evaluate.datasets import published_name
from pipelines.evaluate.tally import Tally, tally_results
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS

IMAGE_COLUMNS = ("I-AUROC", "I-AP", "I-F1-max")
PIXEL_COLUMNS = ("P-AUROC", "P-AP", "P-F1-max", "PRO")
COLUMNS = (*IMAGE_COLUMNS, *PIXEL_COLUMNS, "AUPIMO")
WIDEST = 10_000  # characters of a table
Metrics = dict[str, dict[str, float]]  # by category and column, 0 to 1; NaN if undefined


def evaluate(
    location: str,
    dataset: str,
    console: Console,
    *,
    out: str | None = None,
    address: str | None = None,
    pro_limit: float = 0.3,
    pro_thresholds: int | None = None,
) -> Metrics:
    """Print the table of a run over a dataset and write it as CSV, Markdown and JSON; returns metrics by category.

    Args:
        location: the run folder.
        address: Ray cluster whose machines count; None starts Ray on this one.
        out: folder, local or s3://, for metrics.csv, metrics.md and metrics.json; None writes none.
        pro_limit: largest false-positive rate of PRO.
        pro_thresholds: count PRO at this many even thresholds, as the released code does (200), instead of at all.

    Raises:
        GladError, StorageError, SessionError: no finished run, no dataset, or the two do not belong together.
    """
    run = Run.at(location)
    _ = run.record  # fails at once if the run is not finished
    examples = read_dataset(dataset, run.storage)
    session.connect(address, reads=[run.location, absolute(dataset)])
    tallies = tally_results(run, examples)
    metrics = {name: tallies[name].metrics(pro_limit, pro_thresholds) for name in sorted(tallies)}
    if len(metrics) > 1:
        metrics["average"] = average(list(metrics.values()))
    _warn(run, tallies, examples, console)
    name = published_name(set(tallies))
    for table in (_table(metrics), *_published_tables(name, set(tallies))):
        print_whole(table, console)
    if out is not None:
        _write(metrics, name, out, run.storage)
        console.print(f"metrics.csv, metrics.md and metrics.json in {out}", highlight=False)
    return metrics


def average(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every column over the categories where it is defined; NaN if it is nowhere."""
    columns = {column: np.array([row[column] for row in metrics]) for column in metrics[0]}
    return {
        name: float(np.mean(column[~np.isnan(column)])) if not np.isnan(column).all() else float("nan")
        for name, column in columns.items()
    }


def _warn(run: Run, tallies: dict[str, Tally], examples: list[Example], console: Console) -> None:
    """Print how many test images the metrics leave out, and why."""
    test = sum(example.split == "test" and example.category in tallies for example in examples)
    judged = sum(len(tally.images) + tally.undecided for tally in tallies.values())
    undecided = sum(tally.undecided for tally in tallies.values())
    if undecided:
        lost = f"{undecided} results have no finite score or map: left out of the metrics; score again"
        console.print(f"[yellow]{lost}[/yellow]", highlight=False, soft_wrap=True)
    if judged < test:
        missing = f"{test - judged} of {test} test images have no result: see {run.path(ERRORS)}, or score the rest"
        console.print(f"[yellow]{escape(missing)}[/yellow]", highlight=False, soft_wrap=True)
    doubts = sum((tally.doubts for tally in tallies.values()), Counter[str]())
    for doubt, count in doubts.most_common():
        line = f"{count} masks: {doubt}; see `glad datasets check`"
        console.print(f"[yellow]{escape(line)}[/yellow]", highlight=False, soft_wrap=True)
    unmasked = sum(tally.without_mask for tally in tallies.values())
    if unmasked:
        console.print(
            f"[yellow]{unmasked} anomalous images have no readable mask: left out of the pixel metrics[/yellow]"
        )


def _per_cent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _cells(row: dict[str, float]) -> list[str]:
    interval = f"{_per_cent(row['I-AUROC low'])}-{_per_cent(row['I-AUROC high'])}"
    return [_per_cent(row["I-AUROC"]), interval, *(_per_cent(row[column]) for column in COLUMNS[1:])]


HEADERS = ("category", "I-AUROC", "95 %", *COLUMNS[1:])


def _narrow(name: str) -> str:
    """A heading in two lines."""
    split = {"-AUROC": "-\nAUROC", "F1-max": "F1\nmax", "PIMO": "\nPIMO", " et": "\net"}
    return reduce(lambda words, cut: words.replace(*cut), split.items(), name)


def _empty(headers: Iterable[str], title: str) -> Table:
    """A table set so close that names of 18 characters fit into 80 columns even if every number is 100.0."""
    columns = (Column(_narrow(name), no_wrap=True) for name in headers)
    return Table(*columns, title=title, box=SIMPLE, padding=(0, 0), pad_edge=False)


def _table(metrics: Metrics) -> Table:
    table = _empty(HEADERS, "GLAD on Ray")
    for name, row in metrics.items():
        if name == "average":
            table.add_section()
        table.add_row(escape(name), *_cells(row))
    return table


def print_whole(table: Table, console: Console) -> None:
    """Print a table whose names and numbers are whole, even if that makes it wider than the terminal."""
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


@cache
def published() -> dict[str, Any]:
    """The paper's Tables 1 and 2, per cent."""
    return json.loads((Path(__file__).parent / "published.json").read_text())


def _published_tables(dataset: str | None, categories: set[str]) -> Iterable[Table]:
    """The paper's figures for these categories and their dataset."""
    if dataset is None:
        return
    facts = published()
    columns = (*IMAGE_COLUMNS, *PIXEL_COLUMNS)
    averages = _empty(("method", *columns), f"Published, {dataset}, all categories (Table 2)")
    for method, row in facts["averages"][dataset].items():
        averages.add_row(method, *(str(row.get(column, "-")) for column in columns))
    yield averages
    single = facts["categories"].get(dataset)
    for column in ("I-AUROC", "P-AUROC") if single else ():
        methods = list(next(iter(single.values())))
        table = _empty(("category", *methods), f"Published, {column} (Table 1)")
        for name in sorted(categories):
            table.add_row(escape(name), *(str(single[name][method].get(column, "-")) for method in methods))
        yield table


def _write(metrics: Metrics, dataset: str | None, out: str, storage: Storage) -> None:
    plain = {name: {key: None if np.isnan(v) else v for key, v in row.items()} for name, row in metrics.items()}
    paper = published()["averages"].get(dataset) if dataset else None
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["category", *next(iter(metrics.values()))])
    writer.writerows([name, *(f"{value:.6f}" for value in row.values())] for name, row in metrics.items())
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
    lines += ["| " + " | ".join([name, *_cells(row)]) + " |" for name, row in metrics.items()]
    texts = {
        "metrics.json": json.dumps({"ours": plain, "published": paper}, indent=1) + "\n",
        "metrics.csv": stream.getvalue(),
        "metrics.md": "\n".join(lines) + "\n",
    }
    for name, text in texts.items():
        storage.write(join(absolute(out), name), text.encode())
