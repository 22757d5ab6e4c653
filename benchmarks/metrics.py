"""Time and memory of seven metrics of a set as large as MVTec-AD's test set; PRO against the published computation.

    python benchmarks/metrics.py [--json]

- ``full_set_seconds``, ``peak_rss_gb``: I-AUROC, I-AP, I-F1-max, P-AUROC, P-AP, P-F1-max and PRO of 1,725 float16 maps
  of 512 x 512 with masks, read from disk by two processes; the largest process's memory.
- ``pro_speedup``: PRO of 100 such maps by 200 thresholds and a loop over regions, as the released code does it, against
  `PixelCounts`; ``pro_abs_error``: difference of the two values.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy import ndimage

from glad_core.image_metrics import image_metrics
from glad_core.pixel_metrics import PixelCounts, merged

IMAGES, GOOD_SHARE, SIDE = 1725, 467 / 1725, 512  # MVTec-AD's test set
PUBLISHED_IMAGES = 100


def scene(number: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A smooth random map, float16, with higher blobs, and the blobs' mask; None for a good image."""
    rng = np.random.default_rng(number)
    field = ndimage.zoom(rng.random((32, 32)).astype(np.float32), SIDE / 32, order=1)
    field += 0.05 * rng.random((SIDE, SIDE), dtype=np.float32)
    if number % IMAGES < GOOD_SHARE * IMAGES:
        return field.astype(np.float16), None
    mask = np.zeros((SIDE, SIDE), bool)
    for _ in range(rng.integers(1, 6)):
        y, x = rng.integers(0, SIDE, 2)
        h, w = rng.integers(8, 90, 2)
        mask[y : y + h, x : x + w] = True
    return (field + 0.4 * mask).astype(np.float16), mask


def write(folder: Path, numbers: range) -> None:
    for number in numbers:
        anomaly_map, mask = scene(number)
        np.save(folder / f"{number}.map.npy", anomaly_map)
        if mask is not None:
            np.save(folder / f"{number}.mask.npy", mask)


def count(folder: Path, numbers: range) -> tuple[PixelCounts, list[tuple[float, bool]], float]:
    """Counts and image scores of one share of the maps, and this process's peak memory in GB."""
    counts, images = PixelCounts(), []
    for number in numbers:
        anomaly_map = np.load(folder / f"{number}.map.npy")
        mask = folder / f"{number}.mask.npy"
        counts.add(anomaly_map, np.load(mask) if mask.exists() else None)
        top = np.partition(anomaly_map.ravel(), -250)[-250:]
        images.append((float(top.astype(np.float32).mean()), mask.exists()))
    return counts, images, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def published_pro(maps: np.ndarray, masks: np.ndarray, thresholds: int = 200) -> float:
    """PRO by applying every threshold to the whole set and looping over the regions of every image."""
    low, high = maps.min(), maps.max()
    overlaps, rates = [], []
    for level in np.arange(low, high, (high - low) / thresholds):
        binary = maps > level
        shares = []
        for image, mask in zip(binary, masks, strict=True):
            labelled, regions = ndimage.label(mask, structure=np.ones((3, 3)))
            for number in range(1, regions + 1):
                rows, columns = np.nonzero(labelled == number)
                shares.append(image[rows, columns].sum() / len(rows))
        overlaps.append(np.mean(shares))
        inverse = ~masks
        rates.append((binary & inverse).sum() / inverse.sum())
    rate, overlap = np.array(rates), np.array(overlaps)
    kept = rate < 0.3
    return float(np.trapezoid(overlap[kept][::-1], (rate[kept] / rate[kept].max())[::-1]))


def main(as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line")] = False) -> None:
    """Measure and print."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        folder = Path(name)
        shares = [range(start, IMAGES, 2) for start in (0, 1)]
        list(pool.map(write, [folder] * 2, shares))
        started = time.perf_counter()
        parts = list(pool.map(count, [folder] * 2, shares))
        pixels = merged(counts for counts, _, _ in parts).metrics()
        scores, labels = zip(*(image for _, images, _ in parts for image in images), strict=True)
        whole = image_metrics(np.array(scores), np.array(labels)) | pixels
        figures["full_set_seconds"] = time.perf_counter() - started
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        figures["peak_rss_gb"] = max(own, *(peak for _, _, peak in parts))
        figures |= {name: round(value, 6) for name, value in whole.items()}

    scenes = [scene(IMAGES - 1 - number) for number in range(PUBLISHED_IMAGES)]
    maps = np.stack([anomaly_map for anomaly_map, _ in scenes])
    masks = np.stack([mask for _, mask in scenes if mask is not None])
    started = time.perf_counter()
    counts = PixelCounts()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        counts.add(anomaly_map, mask)
    ours = counts.pro_200()
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    theirs = published_pro(maps.astype(np.float32), masks)
    figures["published_seconds"] = time.perf_counter() - started
    figures["pro_speedup"] = figures["published_seconds"] / seconds
    figures["pro_abs_error"] = abs(ours - theirs)
    figures["pro_exact"], figures["pro_200"] = counts.metrics()["PRO"], ours
    print(json.dumps(figures) if as_json else "\n".join(f"{name:20} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
