"""Quality of a model on the demo's test set with and without adaptive steps (ADS) and feature fusion (SAFF).

    python benchmarks/demo_figures.py [--json] [BUNDLE]

Rows: the bundle as it is; ADS without SAFF; neither, which is plain DDIM (delta = 0).
Columns: AUROC of images and of pixels, seconds per image.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from glad_core.bundle.glad_json import read_description
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Settings
from glad_core.image_metrics import image_metrics
from glad_core.images import resize
from glad_core.judge import detect, map_at_full_size
from glad_core.verdict import Request
from pipelines.demo.boards import DEFECTS, board_rng, make_board
from pipelines.models.find import SMALL_BUNDLE

BATCH = 8


def test_set(resolution: int) -> tuple[list[Request], np.ndarray, np.ndarray]:
    """The 60 test boards of `glad demo-data`, their labels, and their masks, no larger than the model's resolution."""
    requests, labels, masks = [], [], []
    for split in ("good", *DEFECTS):
        for index in range(20 if split == "good" else 10):
            image, mask = make_board(board_rng(0, split, index), None if split == "good" else split)
            requests.append(Request(f"{split}/{index}", resize(image, resolution)))
            labels.append(int(split != "good"))
            side = min(resolution, image.shape[0])
            step = image.shape[0] // side
            masks.append(mask.reshape(side, step, side, step).any(axis=(1, 3)))
    return requests, np.array(labels), np.stack(masks)


def main(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="default: the embedded one")] = SMALL_BUNDLE,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")] = False,
) -> None:
    """Measure and print."""
    settings = Settings.parse(read_description(path).settings, str(path))
    requests, labels, masks = test_set(settings.resolution)
    figures = {}
    for name, change in (("ADS + SAFF", {}), ("ADS", {"saff": False}), ("neither", {"delta": 0.0})):
        model = load_bundle(path, settings=settings.model_copy(update=change))
        by_id = {}
        for start in range(0, len(requests), BATCH):
            by_id |= {result.image_id: result for result in detect(model, requests[start : start + BATCH])}
        results = [by_id[request.image_id] for request in requests]
        scores = np.array([result.score for result in results])
        maps = np.stack([map_at_full_size(model.settings, result).numpy() for result in results])
        figures[name] = {
            "i_auroc": round(image_metrics(scores, labels)["AUROC"], 4),
            "p_auroc": round(roc_auc_score(masks.ravel(), maps.ravel()), 4),
            "seconds_per_image": round(float(np.mean([result.seconds for result in results])), 3),
        }
    if as_json:
        print(json.dumps(figures))
        return
    table = Table("", "image AUROC", "pixel AUROC", "s/image", title=f"{path.name}, {torch.get_num_threads()} threads")
    for name, row in figures.items():
        table.add_row(name, f"{row['i_auroc']:.3f}", f"{row['p_auroc']:.3f}", f"{row['seconds_per_image']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
