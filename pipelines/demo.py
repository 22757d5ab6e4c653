"""`glad demo`: data, scoring job, figures and contact sheet in one go."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console

from glad_core import metrics
from glad_core.detect import full_size_map
from glad_core.settings import Settings
from pipelines.demo_data import make_demo_data
from pipelines.model_source import SMALL_BUNDLE
from pipelines.score import ScoreRequest, score
from pipelines.show import show


def demo(out: Path, console: Console) -> None:
    """Fill ``out`` with data/, run/, sheet.png and metrics.json, and print the table and I-AUROC."""
    started = time.perf_counter()
    folder = make_demo_data(out / "data", 0)
    run = out / "run"
    counts = score(ScoreRequest(str(folder), str(run), reconstructions=True, overwrite=True), console)
    found = evaluate(run, folder)
    show(str(run), 20, out / "sheet.png", console)
    summary = {**found, "images": counts.images, "errors": counts.errors, "seconds": time.perf_counter() - started}
    (out / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(
        f"I-AUROC {found['i_auroc']:.3f}, P-AUROC {found['p_auroc']:.3f}; look at {out / 'sheet.png'}", highlight=False
    )


def evaluate(run: Path, folder: Path) -> dict[str, float]:
    """I-AUROC and P-AUROC of a run over an MVTec-AD category's test folder."""
    settings = Settings.parse(
        json.loads((SMALL_BUNDLE / "glad.json").read_text())["settings"], str(SMALL_BUNDLE / "glad.json")
    )
    size = settings.feature_resolution
    rows = pq.read_table(run / "results").to_pylist()
    labels, scores, maps, masks = [], [], [], []
    for row in rows:
        image = Path(row["uri"].removeprefix("file://"))
        defect = image.parent.name
        labels.append(int(defect != "good"))
        scores.append(row["score"])
        kept = np.asarray(row["anomaly_map"], dtype=np.float32).reshape(row["map_height"], row["map_width"])
        maps.append(full_size_map(torch.from_numpy(kept)[None], settings)[0].numpy())
        mask = np.zeros((size, size), bool)
        if defect != "good":
            with Image.open(folder / "ground_truth" / defect / f"{image.stem}_mask.png") as picture:
                mask = np.asarray(picture.convert("L").resize((size, size), Image.Resampling.NEAREST)) > 0
        masks.append(mask)
    image_values = metrics.image_metrics(np.array(scores), np.array(labels))
    pixel_values = metrics.pixel_metrics(np.stack(maps), np.stack(masks))
    return {"i_auroc": image_values["AUROC"], "p_auroc": pixel_values["P-AUROC"]}
