"""Whether calibration keeps its promises.

    python benchmarks/calibration.py [--json]                                      the false-positive rates
    python benchmarks/calibration.py --dataset DATASET/CATEGORY --model BUNDLE automatic T and δ against the best

The first draws good boards that no training used, takes the threshold from one half and counts how many of the other
half exceed it. It also simulates calibrations with a stated confidence, on scores of a known distribution, and counts
those whose threshold is exceeded too often. The second scores a test set with every start step T and several bounds δ
of the step score around the automatic one. It compares the image AUROC of the automatic pair with that of the best pair
on the test set.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import binom, lognorm
from throughput import boards

from cluster.storage import Storage
from glad_core.bundle.model import Model, load_bundle
from glad_core.calibrated_steps import SELECTION_IMAGES, START_STEPS, StepCalibrator
from glad_core.decoding.picture import decode
from glad_core.engine.base import run
from glad_core.engine.engine import Engine
from glad_core.image_metrics import image_metrics
from glad_core.threshold import confident_threshold, conformal_quantile
from glad_core.verdict import Request
from pipelines.archive.layouts import read_dataset
from pipelines.models.find import SMALL_BUNDLE

FACTORS = (0.0, 1.0, 1e4)  # of the automatic δ; every step score exceeds 0, and none exceeds 1e4 times δ


def scores(model: Model, requests: Sequence[Request]) -> np.ndarray:
    """Image scores in the order of the requests."""
    values = {}
    for request, verdict in run(Engine(model, 8), requests):
        if isinstance(verdict, Exception):
            raise verdict
        values[request.image_id] = verdict.score
    return np.array([values[request.image_id] for request in requests])


def false_positives(model: Model, images: int, target: float) -> dict[str, float]:
    """Threshold from ``images`` good boards, false positives among as many others."""
    values = scores(model, boards(model.settings.resolution, [None] * 2 * images))
    threshold = conformal_quantile(values[:images], target)
    exceeded = int((values[images:] > threshold).sum())
    low, high = binom.interval(0.95, images, target)
    return {
        "target_fpr": target,
        "achieved_fpr": exceeded / images,
        "exceeded": exceeded,
        "images": images,
        "interval_low": low,
        "interval_high": high,
        "within_interval": bool(low <= exceeded <= high),
    }


def exceed_share(images: int, target: float, confidence: float = 0.95, calibrations: int = 1000) -> float:
    """Share of simulated calibrations on ``images`` log-normal scores whose threshold good images exceed too often."""
    draws = np.random.default_rng(0).lognormal(size=(calibrations, images))
    thresholds = [confident_threshold(scores, target, confidence) for scores in draws]
    return float((lognorm.sf(thresholds, s=1) > target).mean())


def automatic_against_best(
    model: Model, dataset: str, every: int, start_steps: Sequence[int] = START_STEPS
) -> dict[str, Any]:
    """Image AUROC on every ``every``-th test image for all pairs of T and δ."""
    storage = Storage.from_environment()
    examples = read_dataset(dataset, storage)
    test = [example for example in examples if example.split == "test"][::every]
    train = [example for example in examples if example.split == "train"]
    train = [train[index] for index in np.linspace(0, len(train) - 1, min(len(train), SELECTION_IMAGES)).astype(int)]
    pixels = {e.uri: decode(storage.read(e.uri), model.settings.resolution).pixels for e in test + train}
    requests = [Request(example.path, pixels[example.uri]) for example in test]
    labels = np.array([int(example.anomalous) for example in test])
    good = [pixels[example.uri] for example in train]
    table: dict[str, float] = {}
    for start_step in start_steps:
        automatic = StepCalibrator(model, start_steps=(start_step,)).choose_steps(good)
        for factor in FACTORS:
            settings = automatic.model_copy(update={"delta": automatic.delta * factor})
            value = image_metrics(scores(replace(model, settings=settings), requests), labels)["AUROC"]
            table[f"T {start_step}, {factor:g} δ"] = value
            print(f"T {start_step}, δ {settings.delta:.4g}: {value:.4f}", flush=True)
    best = max(table, key=lambda name: table[name])
    automatic_auroc = image_metrics(scores(model, requests), labels)["AUROC"]
    return {
        "images": len(test),
        "automatic": automatic_auroc,
        "automatic_T": model.settings.start_step,
        "best": table[best],
        "best_pair": best,
        "distance": table[best] - automatic_auroc,
        "table": table,
    }


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    model: Annotated[Path, typer.Option(help="calibrated bundle")] = SMALL_BUNDLE,
    images: Annotated[int, typer.Option(help="good boards in either half")] = 1000,
    target: Annotated[float, typer.Option(help="target false-positive rate")] = 0.01,
    dataset: Annotated[str | None, typer.Option(help="one category with ground truth")] = None,
    every: Annotated[int, typer.Option(help="take every n-th test image")] = 1,
    start_step: Annotated[list[int], typer.Option(help="T to try; repeat it")] = list(START_STEPS),  # noqa: B006
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    loaded = load_bundle(model)
    if dataset is None:
        figures: dict[str, Any] = {
            **false_positives(loaded, images, target),
            "exceed_share": exceed_share(images, target),
        }
    else:
        figures = automatic_against_best(loaded, dataset, every, start_step)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:16} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
