"""`glad evaluate`: the paper's tables from a run's results and a dataset's ground truth.

Ray Data tasks turn results into counts (`glad_core.pixel_metrics`); counts of all tasks add up to exact metrics.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cluster import session
from cluster.storage import Storage, is_s3, join, local_path
from glad_core.errors import GladError
from glad_core.image_metrics import auroc_interval, image_metrics
from glad_core.pixel_metrics import PixelCounts
from pipelines.archive.decode import ImageError
from pipelines.evaluate.datasets import Example, published_name, read_dataset, read_mask, resize_mask
from pipelines.runs.schema import COMPLETE, ERRORS, RESULTS, read_run, settings_of

TASK_CPUS = 0.5
BATCH = 64
IMAGE_COLUMNS = ("I-AUROC", "I-AP", "I-F1-max")
PIXEL_COLUMNS = ("P-AUROC", "P-AP", "P-F1-max", "PRO")
COLUMNS = (*IMAGE_COLUMNS, *PIXEL_COLUMNS, "AUPIMO")


@dataclass
class Tally:
    """What is known of one category: pixel counts, image scores and labels, images without a mask."""

    pixels: PixelCounts = field(default_factory=PixelCounts)
    images: list[tuple[str, float, bool]] = field(default_factory=list)
    without_mask: int = 0

    def merge(self, other: Tally) -> Tally:
        return Tally(
            self.pixels.merge(other.pixels),
            [*self.images, *other.images],
            self.without_mask + other.without_mask,
        )

    def metrics(self, pro_limit: float = 0.3, pro_thresholds: int | None = None) -> dict[str, float]:
        """All columns, 0 to 1, and the ends of the 95 % bootstrap interval of the image AUROC; NaN where undefined."""
        images = sorted(self.images)  # whatever order the tasks came in
        scores = np.array([score for _, score, _ in images])
        labels = np.array([label for _, _, label in images])
        image = dict.fromkeys(("AUROC", "AP", "F1max"), float("nan"))
        low = high = float("nan")
        if labels.any() and not labels.all():
            image = image_metrics(scores, labels)
            low, high = auroc_interval(scores, labels)
        pixel = self.pixels.metrics(pro_limit)
        if pro_thresholds is not None:
            pixel["PRO"] = self.pixels.pro_200(pro_limit, pro_thresholds)
        return {
            "I-AUROC": image["AUROC"],
            "I-AP": image["AP"],
            "I-F1-max": image["F1max"],
            "P-AUROC": pixel["P-AUROC"],
            "P-AP": pixel["P-AP"],
            "P-F1-max": pixel["P-F1max"],
            "PRO": pixel["PRO"],
            "AUPIMO": pixel["AUPIMO"],
            "I-AUROC low": low,
            "I-AUROC high": high,
        }


def evaluate(
    run_folder: str,
    dataset: str,
    console: Console,
    *,
    out: Path | None = None,
    pro_limit: float = 0.3,
    pro_thresholds: int | None = None,
) -> dict[str, dict[str, float]]:
    """Print the table of a run over a dataset and write it as CSV, Markdown and JSON; returns metrics by category.

    Args:
        out: folder for metrics.csv, metrics.md and metrics.json; none is written when None.
        pro_limit: largest false positive rate of PRO.
        pro_thresholds: count PRO at so many even thresholds, as the released code does (200), instead of at all.

    Raises:
        GladError, StorageError, SessionError: no finished run, no dataset, or the two do not belong together.
    """
    storage = Storage.from_environment()
    folder = run_folder.rstrip("/") if is_s3(run_folder) else local_path(run_folder)
    run = read_run(folder, storage)
    examples = read_dataset(dataset, storage)
    session.connect()
    tallies = tally_results(folder, run, examples, storage)
    metrics = {name: tallies[name].metrics(pro_limit, pro_thresholds) for name in sorted(tallies)}
    if len(metrics) > 1:
        metrics["average"] = {
            column: float(np.mean([of[column] for of in metrics.values()])) for column in next(iter(metrics.values()))
        }
    of_test = sum(example.split == "test" and example.category in tallies for example in examples)
    judged = sum(len(tally.images) for tally in tallies.values())
    if judged < of_test:
        missing = f"{of_test - judged} of {of_test} test images have no result: see {join(folder, ERRORS)}"
        console.print(f"[yellow]{escape(missing)}, or score the rest[/yellow]", highlight=False, soft_wrap=True)
    unmasked = sum(tally.without_mask for tally in tallies.values())
    if unmasked:
        console.print(
            f"[yellow]{unmasked} anomalous images have no readable mask: left out of the pixel metrics[/yellow]"
        )
    name = published_name(set(tallies))
    console.print(_table(metrics, "GLAD on Ray"))
    for theirs in _published_tables(name, set(tallies)):
        console.print(theirs)
    if out is not None:
        _write(metrics, name, out)
        console.print(f"metrics.csv, metrics.md and metrics.json in {out}", highlight=False)
    return metrics


def tally_results(folder: str, run: dict[str, Any], examples: list[Example], storage: Storage) -> dict[str, Tally]:
    """Tallies by category of a run's results, counted by Ray Data tasks.

    Raises:
        GladError: results that are no images of the dataset.
    """
    import ray.data

    filesystem, path = storage.resolve(join(folder, RESULTS))
    columns = ["uri", "category", "score", "anomaly_map", "map_height", "map_width"]
    rows = ray.data.read_parquet(path, filesystem=filesystem, columns=columns, num_cpus=TASK_CPUS)
    counted = rows.map_batches(
        count_batch,  # type: ignore[arg-type]
        fn_kwargs={"run": run, "examples": examples, "storage": storage},
        batch_size=BATCH,
        batch_format="numpy",
        num_cpus=TASK_CPUS,
    )
    tallies: dict[str, Tally] = {}
    try:
        for row in counted.iter_rows():
            part: dict[str, Tally] = pickle.loads(zlib.decompress(row["tallies"]))
            for name, tally in part.items():
                tallies[name] = tallies[name].merge(tally) if name in tallies else tally
    except Exception as error:
        raise session.root_cause(error, GladError) from None
    if not tallies:
        raise GladError(f"{folder}: the run judged no image; see {join(folder, ERRORS)}")
    return tallies


def count_batch(
    batch: dict[str, np.ndarray], run: dict[str, Any], examples: list[Example], storage: Storage
) -> dict[str, list[bytes]]:
    """A stage: results in, one row with the tallies of their categories out."""
    import torch

    from pipelines.report.contact_sheet import full_map

    torch.set_num_threads(1)
    truth = _by_path(tuple(examples))
    tallies: dict[str, Tally] = {}
    for place in range(len(batch["uri"])):
        row = {name: values[place] for name, values in batch.items()}
        example = find_example(str(row["uri"]), truth)
        tally = tallies.setdefault(example.category, Tally())
        tally.images.append((str(row["uri"]), float(row["score"]), example.anomalous))
        settings = settings_of(run, str(row["category"]), COMPLETE)
        anomaly_map = full_map(row, settings).astype(np.float16)
        if not example.anomalous:
            tally.pixels.add(anomaly_map, None)
            continue
        try:
            mask = read_mask(example, storage) if example.mask is not None else None
        except ImageError:
            mask = None
        if mask is None:
            tally.without_mask += 1
            continue
        tally.pixels.add(anomaly_map, resize_mask(mask, anomaly_map.shape[0]))
    return {"tallies": [zlib.compress(pickle.dumps(tallies), 1)]}


@cache
def _by_path(examples: tuple[Example, ...]) -> dict[str, Example]:
    return {example.path: example for example in examples}


def find_example(uri: str, truth: dict[str, Example]) -> Example:
    """The dataset's image that a result is about: the one whose path ends the result's URI.

    Raises:
        GladError: there is none.
    """
    parts = uri.removeprefix("file://").split("::")[0].removeprefix("tar://").split("/")
    for start in range(max(0, len(parts) - 8), len(parts)):
        found = truth.get("/".join(parts[start:]))
        if found is not None:
            return found
    raise GladError(f"{uri}: a scored image that is not in the dataset; name the dataset that was scored")


def _per_cent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _cells(of: dict[str, float]) -> list[str]:
    image = "/".join(_per_cent(of[column]) for column in IMAGE_COLUMNS)
    pixel = "/".join(_per_cent(of[column]) for column in PIXEL_COLUMNS)
    interval = f"{_per_cent(of['I-AUROC low'])}-{_per_cent(of['I-AUROC high'])}"
    return [image, interval, pixel, _per_cent(of["AUPIMO"])]


HEADERS = ("category", "/".join(IMAGE_COLUMNS), "I-AUROC 95 %", "/".join(PIXEL_COLUMNS), "AUPIMO")
NARROW = ("category", "I-AUROC/\nI-AP/I-F1-max", "I-AUROC\n95 %", "P-AUROC/P-AP/\nP-F1-max/PRO", "AUPIMO")


def _table(metrics: dict[str, dict[str, float]], title: str) -> Table:
    # So close together they fit into 80 columns even where everything is 100.0.
    columns = (Column(name, overflow="fold") for name in NARROW)
    table = Table(*columns, title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name, of in metrics.items():
        if name == "average":
            table.add_section()
        table.add_row(name, *_cells(of))
    return table


@cache
def published() -> dict[str, Any]:
    """The paper's Tables 1 and 2, per cent."""
    return json.loads((Path(__file__).parent / "published.json").read_text())


def _published_tables(dataset: str | None, categories: set[str]) -> Iterable[Table]:
    """What the paper reports for these categories and their dataset."""
    if dataset is None:
        return
    facts = published()
    averages = Table("method", NARROW[1], NARROW[3], title=f"Published, {dataset}, all categories (Table 2)")
    for method, of in facts["averages"][dataset].items():
        image, pixel = (
            "/".join(str(of.get(column, "-")) for column in columns) for columns in (IMAGE_COLUMNS, PIXEL_COLUMNS)
        )
        averages.add_row(method, image, pixel)
    yield averages
    single = facts["categories"].get(dataset)
    if single:
        methods = list(next(iter(single.values())))
        table = Table("category", *methods, title="Published, I-AUROC/P-AUROC (Table 1)")
        for name in sorted(categories):
            cells = [
                "/".join(str(single[name][method].get(column, "-")) for column in ("I-AUROC", "P-AUROC"))
                for method in methods
            ]
            table.add_row(name, *cells)
        yield table


def _write(metrics: dict[str, dict[str, float]], dataset: str | None, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        shown = {name: {key: None if np.isnan(v) else v for key, v in of.items()} for name, of in metrics.items()}
        theirs = published()["averages"].get(dataset) if dataset else None
        (out / "metrics.json").write_text(json.dumps({"ours": shown, "published": theirs}, indent=1) + "\n")
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["category", *next(iter(metrics.values()))])
        writer.writerows([name, *(f"{value:.6f}" for value in of.values())] for name, of in metrics.items())
        (out / "metrics.csv").write_text(stream.getvalue())
        lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
        lines += ["| " + " | ".join([name, *_cells(of)]) + " |" for name, of in metrics.items()]
        (out / "metrics.md").write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise GladError(f"{out}: {error.strerror or error}; choose another --out") from error
