"""`glad show`: one picture of a run's highest-scored images, each with its reconstruction and heat map."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from cluster.storage import Storage, clear_errors
from glad_core.bundle.settings import Settings
from glad_core.decoding.picture import ImageError, decode, decode_image
from glad_core.errors import GladError
from pipelines.archive.fetch import fetch
from pipelines.report.cards import STOP_REASONS
from pipelines.report.figures import save_figure
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS

CELL = 1.7  # inches per picture
PANELS = 3  # input, reconstruction, heat map


def show(run_folder: str, top: int, out: str, console: Console) -> None:
    """Write a PNG of the ``top`` highest-scored images of a run, highest first, two to a row.

    Raises:
        GladError, StorageError: no finished run there, no results in it, or ``out`` cannot be written.
    """
    run = Run.at(run_folder)
    results = run.results()
    with clear_errors(run.location, run.storage):
        rows, undecided = highest(results, top)
        manifest = run.manifest_rows([row["image_id"] for row in rows])
    if undecided:
        console.print(f"[yellow]{undecided} results have no finite score: undecided, not shown[/yellow]")
    if not rows:
        raise GladError(f"{run.location}: the run judged no image; see {run.path(ERRORS)}")
    if rows[0]["reconstruction"] is None:
        console.print("The run has no reconstructions to show: score with --reconstructions to keep them.")
    pictures = [_input(manifest.get(row["image_id"]), run.storage, run.settings_of(row["category"])) for row in rows]
    maps = [np.nan_to_num(run.full_map(row), nan=0, posinf=0, neginf=0) for row in rows]
    save_figure(_sheet(rows, pictures, maps), out, run.storage)
    console.print(f"{len(rows)} images in {escape(out)}", highlight=False)


def highest(results: pads.Dataset, top: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of the ``top`` highest scores, highest first; ties by image id. Holds no other rows.

    Returns:
        The rows, and the number of results without a finite score, which are not among them.
    """
    decided = pc.is_finite(pads.field("score"))

    def ranked() -> Iterator[tuple[float, str]]:
        for batch in results.to_batches(columns=["image_id", "score"], filter=decided):
            yield from zip(batch["score"].to_pylist(), batch["image_id"].to_pylist(), strict=True)

    best = {image_id for _, image_id in heapq.nlargest(top, ranked())}
    table = results.to_table(filter=pads.field("image_id").isin(pa.array(best, pa.string())))
    rows = sorted(table.to_pylist(), key=lambda row: (row["score"], row["image_id"]), reverse=True)
    return rows, results.count_rows() - results.count_rows(filter=decided)


def _input(manifest_row: dict[str, Any] | None, storage: Storage, settings: Settings) -> np.ndarray | None:
    """The image as its first view saw it, uint8 [h, w, 3]; None if it was moved or changed since."""
    if manifest_row is None:
        return None
    try:
        return decode(fetch(storage, manifest_row), settings.framings(), manifest_row.get("page")).pixels
    except ImageError:
        return None


def _sheet(rows: list[dict[str, Any]], pictures: list[np.ndarray | None], maps: list[np.ndarray]) -> Figure:
    """The figure; one colour scale for all heat maps, so that good images look cold."""
    hottest = max(float(anomaly_map.max()) for anomaly_map in maps)
    per_row = min(2, len(rows))
    lines = -(-len(rows) // per_row)
    figure = Figure(figsize=(CELL * per_row * PANELS, (CELL + 0.3) * lines))
    axes = figure.subplots(lines, per_row * PANELS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (row, picture, anomaly_map) in enumerate(zip(rows, pictures, maps, strict=True)):
        first = (index % per_row) * PANELS
        _draw(axes[index // per_row, first : first + PANELS], row, picture, anomaly_map, hottest)
    figure.tight_layout(pad=0.4)
    return figure


def _draw(
    panels: np.ndarray, row: dict[str, Any], picture: np.ndarray | None, anomaly_map: np.ndarray, hottest: float
) -> None:
    """Fill the three panels of one image."""
    height, width = anomaly_map.shape
    extent = (0, width, height, 0)
    if picture is not None:
        panels[0].imshow(picture, extent=extent)
        panels[2].imshow(picture, extent=extent)
    else:
        panels[0].text(0.5, 0.5, "input not found", ha="center", va="center", fontsize=7)
    if row["reconstruction"] is not None:
        panels[1].imshow(decode_image(row["reconstruction"]), extent=extent)
    else:
        panels[1].text(0.5, 0.5, "not stored", ha="center", va="center", fontsize=7)
    panels[2].imshow(anomaly_map, cmap="jet", alpha=0.5, vmin=0, vmax=hottest, extent=extent)
    verdict = {True: "anomalous", False: "good", None: ""}[row["is_anomalous"]]
    panels[0].set_title("/".join(row["uri"].split("/")[-2:]), fontsize=7)
    panels[1].set_title(stop_label(row["stop_step"], row["stop_reason"]), fontsize=7)
    panels[2].set_title(f"score {row['score']:.3f} {verdict}", fontsize=7)


def stop_label(step: int | None, reason: str | None) -> str:
    """Where denoising stopped, and why."""
    words = STOP_REASONS[reason or "none"]
    return words if step is None else f"step {step}: {words}"
