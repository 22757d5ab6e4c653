"""`glad show`: a contact sheet of a run's highest scores, so that people can look."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from cluster.storage import Storage, clear_errors, is_s3, join, local_path
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.archive.decode import ImageError, decode, decode_image, fetch
from pipelines.runs.schema import COMPLETE, ERRORS, MANIFEST, RESULTS, RESULTS_SCHEMA, read_run, settings_of

matplotlib.use("Agg")  # before pyplot: the sheet is a file, no window system is needed
from matplotlib import pyplot as plt

CELL = 1.7  # inches per picture
PANELS = 3  # input, reconstruction, heat map


def show(run_folder: str, top: int, out: Path, console: Console) -> None:
    """Write a PNG of the ``top`` highest-scored images of a run, best first, two to a row.

    Raises:
        GladError, StorageError: no finished run there, no results in it, or ``out`` cannot be written.
    """
    storage = Storage.from_environment()
    folder = run_folder.rstrip("/") if is_s3(run_folder) else local_path(run_folder)
    run = read_run(folder, storage)
    with clear_errors(folder, storage):
        rows = highest(folder, top, storage)
        places = places_of(folder, [row["image_id"] for row in rows], storage)
    if not rows:
        raise GladError(f"{folder}: the run judged no image; see {join(folder, ERRORS)}")
    if rows[0]["reconstruction"] is None:
        console.print("The run has no reconstructions to show: score with --reconstructions to keep them.")

    where = join(folder, COMPLETE)
    settings = [settings_of(run, row["category"], where) for row in rows]
    maps = [full_map(row, of_row) for row, of_row in zip(rows, settings, strict=True)]
    hottest = max(float(anomaly_map.max()) for anomaly_map in maps)
    per_row = min(2, len(rows))
    lines = -(-len(rows) // per_row)
    figure, axes = plt.subplots(
        lines, per_row * PANELS, figsize=(CELL * per_row * PANELS, (CELL + 0.3) * lines), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, (row, anomaly_map) in enumerate(zip(rows, maps, strict=True)):
        first = (index % per_row) * PANELS
        picture = _input(places.get(row["image_id"]), storage, settings[index].resolution)
        _draw(axes[index // per_row, first : first + PANELS], row, picture, anomaly_map, hottest)
    figure.tight_layout(pad=0.4)
    save_figure(figure, out)
    console.print(f"{len(rows)} images in {escape(str(out))}", highlight=False)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure as PNG and close it.

    Raises:
        GladError: ``out`` cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, format="png")
    except OSError as error:
        raise GladError(f"{out}: {error.strerror or error}; choose another --out") from error
    finally:
        plt.close(figure)


def highest(folder: str, top: int, storage: Storage) -> list[dict[str, Any]]:
    """The rows of the ``top`` highest scores, in falling order; ties by image id. Only these rows are ever held."""
    filesystem, path = storage.resolve(join(folder, RESULTS))
    dataset = pads.dataset(path, filesystem=filesystem, schema=RESULTS_SCHEMA)

    def ranked() -> Iterator[tuple[float, str]]:
        for batch in dataset.to_batches(columns=["image_id", "score"]):
            yield from zip(batch["score"].to_pylist(), batch["image_id"].to_pylist(), strict=True)

    best = {image_id for _, image_id in heapq.nlargest(top, ranked())}
    table = dataset.to_table(filter=pads.field("image_id").isin(list(best)))
    return sorted(table.to_pylist(), key=lambda row: (row["score"], row["image_id"]), reverse=True)


def full_map(row: dict[str, Any], settings: Settings) -> np.ndarray:
    """The row's anomaly map at full size, float32 [D, D]; a token-resolution map is enlarged as the score saw it."""
    shape = (row["map_height"], row["map_width"])
    anomaly_map = np.asarray(row["anomaly_map"], np.float32).reshape(shape)
    if shape == (settings.feature_resolution, settings.feature_resolution):
        return anomaly_map
    import torch  # not above: seconds that a list of results need not wait

    from glad_core.scoring import full_size_map

    return full_size_map(torch.from_numpy(anomaly_map)[None], settings)[0].numpy()


def places_of(folder: str, image_ids: list[str], storage: Storage) -> dict[str, dict[str, Any]]:
    """The manifest rows of images: where to read them again, tar members included."""
    filesystem, path = storage.resolve(join(folder, MANIFEST))
    wanted = pa.array(image_ids, pa.string())  # with its type, also where there are none
    table = pads.dataset(path, filesystem=filesystem).to_table(filter=pads.field("image_id").isin(wanted))
    return {row["image_id"]: row for row in table.to_pylist()}


def _input(place: dict[str, Any] | None, storage: Storage, resolution: int) -> np.ndarray | None:
    if place is None:
        return None
    try:
        return decode(fetch(storage, place), resolution).pixels
    except ImageError:  # moved or changed since: the sheet shows an empty place
        return None


def _draw(
    panels: np.ndarray, row: dict[str, Any], picture: np.ndarray | None, anomaly_map: np.ndarray, hottest: float
) -> None:
    """Three panels of one image; one colour scale for the whole sheet, so that good images look cold."""
    side = anomaly_map.shape[0]
    extent = (0, side, side, 0)
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
    step = "-" if row["stop_step"] is None else row["stop_step"]
    panels[0].set_title("/".join(row["uri"].split("/")[-2:]), fontsize=7)
    panels[1].set_title(f"stop step {step} ({row['stop_reason']})", fontsize=7)
    panels[2].set_title(f"score {row['score']:.3f} {verdict}", fontsize=7)
