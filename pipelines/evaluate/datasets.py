"""Test sets with ground truth: MVTec-AD's layout (also MPDD, and VisA and PCB-Bank once reorganised) and VisA's own.

CATEGORY/test/DEFECT/NAME.png       CATEGORY/ground_truth/DEFECT/NAME[_mask].png       (MVTec-AD)
split_csv/1cls.csv or 1cls.csv with the columns object, split, label, image, mask       (VisA, PCB-Bank)
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import Storage, is_s3, join, local_path
from glad_core.bundle import presets
from glad_core.errors import GladError
from pipelines.archive.decode import FETCH_THREADS, IMAGE_SUFFIXES, ImageError, decode_image, fetch

SPLIT_FILES = ("split_csv/1cls.csv", "1cls.csv")
SPLIT_COLUMNS = {"object", "split", "label", "image", "mask"}


@dataclass(frozen=True)
class Example:
    """One image of a dataset. ``path`` ends the URI of its scored result; ``mask`` is a URI, None without one."""

    path: str
    uri: str
    category: str
    split: str
    anomalous: bool
    mask: str | None


def read_dataset(location: str, storage: Storage) -> list[Example]:
    """Every image of a dataset, train and test.

    Raises:
        GladError: no dataset of a known layout there. StorageError: storage cannot be used.
    """
    root = location.rstrip("/") if is_s3(location) else local_path(location)
    if storage.kind(root) != "folder":
        raise GladError(f"{root}: no such dataset folder")
    for name in SPLIT_FILES:
        if storage.kind(join(root, name)) == "file":
            return list(_split_csv(root, join(root, name), storage))
    if {"train", "test"} <= set(storage.folders(root)):
        return list(_mvtec_category(root, storage))
    folders = [join(root, name) for name in storage.folders(root)]
    found = [
        example
        for folder in folders
        if {"train", "test"} <= set(storage.folders(folder))
        for example in _mvtec_category(folder, storage)
    ]
    if not found:
        raise GladError(
            f"{root}: no dataset there; known are MVTec-AD's layout (CATEGORY/train, CATEGORY/test, "
            "CATEGORY/ground_truth) and VisA's (split_csv/1cls.csv)"
        )
    return found


def _mvtec_category(folder: str, storage: Storage) -> Iterator[Example]:
    category = folder.rpartition("/")[2]
    masks: dict[tuple[str, str], str] = {}
    truth = join(folder, "ground_truth")
    if storage.kind(truth) == "folder":
        for path, _ in storage.walk(truth):
            place = PurePosixPath(path)
            masks[str(place.parent), place.stem.removesuffix("_mask")] = join(truth, path)
    for split in ("train", "test"):
        for path, _ in storage.walk(join(folder, split)):
            place = PurePosixPath(path)
            if place.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            good = place.parts[0] == "good"
            mask = None if good else masks.get((str(place.parent), place.stem))
            uri = join(folder, split, path)
            yield Example(f"{category}/{split}/{path}", uri, category, split, not good, mask)


def _split_csv(root: str, table: str, storage: Storage) -> Iterator[Example]:
    """Rows of VisA's split file; images and masks are named from the dataset's root."""
    rows = csv.DictReader(io.StringIO(storage.read(table).decode("utf-8-sig")))
    missing = SPLIT_COLUMNS - set(rows.fieldnames or [])
    if missing:
        raise GladError(f"{table}: lacks the column {', '.join(sorted(missing))}; VisA's split file is expected")
    for row in rows:
        anomalous = row["label"] != "normal"
        mask = join(root, row["mask"]) if anomalous and row["mask"] else None
        yield Example(row["image"], join(root, row["image"]), row["object"], row["split"], anomalous, mask)


def published_name(categories: set[str]) -> str | None:
    """The paper's dataset that has all of these categories."""
    datasets = presets.table()["datasets"]
    return next((name for name, facts in datasets.items() if categories <= set(facts["categories"])), None)


def read_mask(example: Example, storage: Storage) -> np.ndarray:
    """Where an anomalous image is anomalous, bool [H, W]: whatever is not 0 in any channel.

    Raises:
        ImageError: not readable.
    """
    assert example.mask is not None
    return np.any(decode_image(fetch(storage, {"uri": example.mask, "size": None})), axis=2)


def resize_mask(mask_HW: np.ndarray, side: int) -> np.ndarray:
    """bool [H, W] to bool [side, side], nearest pixel."""
    return np.asarray(Image.fromarray(mask_HW).resize((side, side), Image.Resampling.NEAREST))


def check(location: str, console: Console) -> dict[str, Any]:
    """Print what a dataset holds and what is wrong with it; returns it too, counts by category and ``problems``."""
    storage = Storage.from_environment()
    examples = read_dataset(location, storage)
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        problems = [problem for problem in pool.map(lambda example: _problem(example, storage), examples) if problem]
    name = published_name({example.category for example in examples})
    columns = ("train good", "test good", "test anomalous", "with mask")
    table = Table("category", *columns, title=name)
    found: dict[str, dict[str, int]] = {}
    for category in sorted({example.category for example in examples}):
        mine = [example for example in examples if example.category == category]
        kinds = Counter((example.split, example.anomalous) for example in mine)
        masks = sum(example.mask is not None for example in mine)
        counts = (kinds["train", False], kinds["test", False], kinds["test", True], masks)
        found[category] = dict(zip(columns, counts, strict=True))
        table.add_row(category, *map(str, counts))
    console.print(table)
    for problem in problems:
        console.print(f"[red]{escape(problem)}[/red]", highlight=False, soft_wrap=True)
    console.print(f"{len(examples)} images, {len(problems)} problems", highlight=False)
    return {"dataset": name, "images": len(examples), "categories": found, "problems": problems}


def _problem(example: Example, storage: Storage) -> str | None:
    try:
        image = decode_image(fetch(storage, {"uri": example.uri, "size": None}))
    except ImageError as error:
        return f"{example.uri}: {error}"
    if not example.anomalous:
        return None
    if example.split == "train":
        return f"{example.uri}: an anomalous image among the training images"
    if example.mask is None:
        return f"{example.uri}: anomalous, but without a mask"
    try:
        mask = read_mask(example, storage)
    except ImageError as error:
        return f"{example.mask}: {error}"
    if mask.shape != image.shape[:2]:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (mask.shape, image.shape)]
        return f"{example.mask}: {sizes[0]} pixels, its image has {sizes[1]}"
    if not mask.any():
        return f"{example.mask}: nothing is marked in it"
    return None
