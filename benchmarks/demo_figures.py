"""What ADS and SAFF bring the small model on the demo test set: I-AUROC, P-AUROC, seconds per image.

    python benchmarks/demo_figures.py [--json] [BUNDLE]

Rows: the bundle as it is; ADS without SAFF; neither (δ = 0: plain DDIM from T, nothing compared on the way).
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
    """The 60 test boards of `glad demo-data`, their labels, and masks of the model's side, or their own if smaller."""
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
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the embedded one by default")] = SMALL_BUNDLE,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """Measure and print."""
    settings = Settings.parse(read_description(path).settings, str(path))
    requests, labels, masks = test_set(settings.resolution)
    figures = {}
    for name, change in (("ADS + SAFF", {}), ("ADS", {"saff": False}), ("neither", {"delta": 0.0})):
        model = load_bundle(path, settings=settings.model_copy(update=change))
        found = {}
        for start in range(0, len(requests), BATCH):
            found |= {result.image_id: result for result in detect(model, requests[start : start + BATCH])}
        ordered = [found[request.image_id] for request in requests]
        scores = np.array([result.score for result in ordered])
        maps = np.stack([map_at_full_size(model.settings, result).numpy() for result in ordered])
        figures[name] = {
            "i_auroc": round(image_metrics(scores, labels)["AUROC"], 4),
            "p_auroc": round(roc_auc_score(masks.ravel(), maps.ravel()), 4),
            "seconds_per_image": round(float(np.mean([result.seconds for result in ordered])), 3),
        }
    if as_json:
        print(json.dumps(figures))
        return
    table = Table("", "I-AUROC", "P-AUROC", "s/image", title=f"{path.name}, {torch.get_num_threads()} threads")
    for name, row in figures.items():
        table.add_row(name, f"{row['i_auroc']:.3f}", f"{row['p_auroc']:.3f}", f"{row['seconds_per_image']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
