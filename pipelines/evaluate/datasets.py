"""`glad datasets check`: what a dataset holds and what is wrong with it; and the masks of its anomalous images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import Storage
from glad_core.bundle import presets
from pipelines.archive.fetch import FETCH_THREADS, fetch, neighbours
from pipelines.archive.layouts import Example, read_dataset
from pipelines.archive.picture import ImageError, decode_image

COLUMNS = ("train good", "test good", "test anomalous", "with mask")


def published_name(categories: set[str]) -> str | None:
    """The paper's dataset that has all of these categories."""
    datasets = presets.table()["datasets"]
    return next((name for name, facts in datasets.items() if categories <= set(facts["categories"])), None)


def read_mask(example: Example, storage: Storage, examples: Sequence[Example]) -> np.ndarray:
    """Where an anomalous image is anomalous, bool [H, W]: pixels that are not 0 in any channel.

    Args:
        examples: of the dataset. If one of their images can be read and the mask cannot, the mask is at fault.

    Raises:
        ImageError: not readable. StorageError: nor are other images.
    """
    assert example.mask is not None
    return np.any(_read(example.mask, storage, examples), axis=2)


def _read(uri: str, storage: Storage, examples: Sequence[Example]) -> np.ndarray:
    row = {"uri": uri}
    return decode_image(fetch(storage, row, lambda: neighbours(row, [{"uri": other.uri} for other in examples])))


def resize_mask(mask_HW: np.ndarray, side: int) -> np.ndarray:
    """bool [H, W] to bool [side, side], nearest pixel."""
    return np.asarray(Image.fromarray(mask_HW).resize((side, side), Image.Resampling.NEAREST))


def check(location: str, console: Console) -> dict[str, Any]:
    """Print what a dataset holds and what is wrong with it; returns both, counts by category and ``problems``.

    Raises:
        GladError: no dataset of a known layout there. StorageError: storage cannot be used.
    """
    storage = Storage.from_environment()
    examples = read_dataset(location, storage)
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        problems = [
            problem for problem in pool.map(lambda example: _problem(example, storage, examples), examples) if problem
        ]
    names = sorted({example.category for example in examples})
    counts = {name: _counts([example for example in examples if example.category == name]) for name in names}
    dataset = published_name(set(names))
    table = Table("category", *COLUMNS, title=dataset)
    for name, row in counts.items():
        table.add_row(name, *map(str, row.values()))
    console.print(table)
    for problem in problems:
        console.print(f"[red]{escape(problem)}[/red]", highlight=False, soft_wrap=True)
    console.print(f"{len(examples)} images, {len(problems)} problems", highlight=False)
    return {"dataset": dataset, "images": len(examples), "categories": counts, "problems": problems}


def _counts(examples: list[Example]) -> dict[str, int]:
    kinds = Counter((example.split, example.anomalous) for example in examples)
    masks = sum(example.mask is not None for example in examples)
    return dict(zip(COLUMNS, (kinds["train", False], kinds["test", False], kinds["test", True], masks), strict=True))


def _problem(example: Example, storage: Storage, examples: Sequence[Example]) -> str | None:
    try:
        image = _read(example.uri, storage, examples)
    except ImageError as error:
        return f"{example.uri}: {error}"
    if not example.anomalous:
        return None
    if example.split == "train":
        return f"{example.uri}: an anomalous image among the training images"
    if example.mask is None:
        return f"{example.uri}: anomalous, but without a mask"
    try:
        mask = read_mask(example, storage, examples)
    except ImageError as error:
        return f"{example.mask}: {error}"
    if mask.shape != image.shape[:2]:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (mask.shape, image.shape)]
        return f"{example.mask}: {sizes[0]} pixels, its image has {sizes[1]}"
    if not mask.any():
        return f"{example.mask}: nothing is marked in it"
    return None
