"""`glad datasets check`: what a dataset holds and what is wrong with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import Storage
from glad_core.bundle import presets
from glad_core.decoding.opened import ImageError, orientation, pages
from glad_core.decoding.picture import decode_image
from pipelines.archive.examples import SPLITS, Example
from pipelines.archive.fetch import FETCH_THREADS
from pipelines.archive.layouts import read_whole
from pipelines.evaluate.masks import fetch_from, marks, read_mask

LONG = 1.5  # times longer than wide
TWIN = "an image beside it has the same name; a mask there would be called NAME_mask"
EACH = 3  # problems of a kind that have a line each
COLUMNS = ("train good", "test good", "test anomalous", "with mask")
Problem = tuple[str, str]  # URI of the file, and what is wrong with it


def published_name(categories: set[str]) -> str | None:
    """The paper's dataset that has all of these categories."""
    datasets = presets.table()["datasets"]
    return next((name for name, facts in datasets.items() if categories <= set(facts["categories"])), None)


def check(location: str, console: Console) -> dict[str, Any]:
    """Print what a dataset holds and what is wrong with it; returns both, counts by category and ``problems``.

    Raises:
        GladError: no dataset of a known layout there. StorageError: storage cannot be used.
    """
    storage = Storage.from_environment()
    examples, orphans, others = read_whole(location, storage)
    spare = [mask for example in examples if not example.anomalous for mask in example.masks] + orphans
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        found = list(pool.map(lambda example: _look(example, storage, examples), examples))
        marked = list(pool.map(lambda uri: marks(uri, storage, examples), spare))
    sizes = {example.uri: size for example, (size, _) in zip(examples, found, strict=True) if size is not None}
    problems = [problem for _, problem in found if problem]
    problems += [
        (uri, "a mask of no anomalous image") for uri, marks_some in zip(spare, marked, strict=True) if marks_some
    ]
    problems += [(uri, TWIN) for uri in _twins(examples)]
    repeated = [example for example in examples if example.rows > 1]
    problems += [(example.uri, f"in {example.rows} rows of the split file; it counts once") for example in repeated]
    names = sorted({example.category for example in examples})
    counts = {name: _counts([example for example in examples if example.category == name]) for name in names}
    dataset = published_name(set(names))
    table = Table("category", *COLUMNS, title=dataset)
    for name, row in counts.items():
        table.add_row(escape(name), *map(str, row.values()))
    console.print(table)
    notes = [f"left out, since it is no split and holds no masks: {folder}" for folder in others]
    for line in _taken_for(examples) + _shapes(list(sizes.values())) + notes:
        console.print(escape(line), highlight=False, soft_wrap=True)
    for line in _grouped(problems):
        console.print(f"[red]{escape(line)}[/red]", highlight=False, soft_wrap=True)
    console.print(f"{len(examples)} images, {len(problems)} problems", highlight=False)
    lines = [f"{uri}: {what}" for uri, what in problems]
    return {"dataset": dataset, "images": len(examples), "categories": counts, "problems": lines}


def _grouped(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem; of more than `EACH` that differ in numbers at most, one for all."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\d+", "#", problem[1]), []).append(problem)
    lines = []
    for kind in kinds.values():
        if len(kind) > EACH:
            (uri, what), names = kind[0], "--json names all"
            lines.append(f"{len(kind)} files, the first {uri}: {what} ({names})")
        else:
            lines += [f"{uri}: {what}" for uri, what in kind]
    return lines


def _twins(examples: Sequence[Example]) -> list[str]:
    """URIs of images that differ from one before them in their suffix alone."""
    names = [(PurePosixPath(example.path).with_suffix(""), example.uri) for example in examples]
    first = dict(reversed(names))
    return [uri for name, uri in names if first[name] != uri]


def _taken_for(examples: Sequence[Example]) -> list[str]:
    """One line: which folders or labels of the test images mean good ones, and which defects."""
    words = []
    for anomalous, name in ((False, "good ones"), (True, "defects")):
        kinds = {e.kind for e in examples if e.split == "test" and e.anomalous == anomalous}
        if kinds:
            words.append(f"{name}: {', '.join(sorted(kind or '(no folder)' for kind in kinds))}")
    return [f"test images taken for {'; for '.join(words)}"] if words else []


def _shapes(sizes: Sequence[tuple[int, int]]) -> list[str]:
    """What a model that sees every picture as one square would lose, in a line for each loss."""
    if not sizes:
        return []
    long = sum(max(size) > LONG * min(size) for size in sizes)
    lines = []
    if len(set(sizes)) > 1:
        areas = sorted(sizes, key=lambda size: (size[0] * size[1], size))
        (low_h, low_w), (high_h, high_w) = areas[0], areas[-1]
        lines.append(f"{len(set(sizes))} sizes, from {low_w} x {low_h} to {high_w} x {high_h} pixels")
    if long:
        lines.append(
            f"{long} of {len(sizes)} pictures are more than {LONG:g} times longer than wide: as one square (`squash`) "
            "they lose their shape; `glad train --views fit` or tiles keep it"
        )
    return lines


def _counts(examples: list[Example]) -> dict[str, int]:
    kinds = Counter((example.split, example.anomalous) for example in examples)
    masks = sum(example.anomalous and bool(example.masks) for example in examples)
    return dict(zip(COLUMNS, (kinds["train", False], kinds["test", False], kinds["test", True], masks), strict=True))


def _look(
    example: Example, storage: Storage, examples: Sequence[Example]
) -> tuple[tuple[int, int] | None, Problem | None]:
    """Height and width of an image, and what is wrong with it or its masks."""
    try:
        data = fetch_from(example.uri, storage, examples)
        image, way = decode_image(data), orientation(data)
    except ImageError as error:
        return None, (example.uri, str(error))
    size = (image.shape[0], image.shape[1])
    if example.split not in SPLITS.values():
        return size, (example.uri, f"of the split '{example.split}'; only train, test and validation count")
    # On its side, a picture that is not square has a mask of its size only if that was drawn on the upright one.
    turned = way in (2, 3, 4) or (way > 4 and size[0] == size[1])
    problem = _problem(example, size, turned, storage, examples) if example.anomalous else None
    return size, problem or _further_pages(example, data)


def _further_pages(example: Example, data: bytes) -> Problem | None:
    count = len(pages(data)[0])
    if count == 1:
        return None
    return example.uri, f"{count} pages, of which a dataset takes the first: score it with --pages first"


def _problem(
    example: Example, size: tuple[int, int], turned: bool, storage: Storage, examples: Sequence[Example]
) -> Problem | None:
    if example.split != "test":
        return example.uri, f"an anomalous image among the {example.split} images"
    if not example.masks:
        return example.uri, "anomalous, but without a mask"
    try:
        mask = read_mask(example, storage, examples)
    except ImageError as error:
        return example.masks[0], str(error)
    doubts = [*mask.doubts]
    if mask.marked.shape != size:
        (h, w), (mask_h, mask_w) = size, mask.marked.shape
        why = "; is the image turned by its EXIF, and the mask not?" if (mask_h, mask_w) == (w, h) else ""
        doubts.insert(0, f"{mask_w} x {mask_h} pixels, its image has {w} x {h}{why}")
    elif turned and not mask.turned:
        doubts.append("its image is turned by its EXIF, and the mask is not: was it drawn on the upright image?")
    return (example.masks[0], "; ".join(doubts)) if doubts else None
