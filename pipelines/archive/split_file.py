"""Datasets in VisA's layout, also PCB-Bank's: a split file names every image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from cluster.storage import Storage, clear_errors, join
from glad_core.errors import GladError
from pipelines.archive.examples import SPLITS, Example, is_good
from pipelines.archive.rows import LeftOut
from pipelines.archive.uri_list import csv_rows

SPLIT_FILES = ("split_csv/1cls.csv", "1cls.csv")
NO_MASK = {"", "nan", "none", "null", "n/a", "<na>"}  # as programs write a missing value
SPLIT_COLUMNS = {"object", "split", "label", "image", "mask"}


def split_file(root: str, storage: Storage) -> str | None:
    """The split file that makes a folder a dataset in VisA's layout, None if there is none."""
    return next((join(root, name) for name in SPLIT_FILES if storage.kind(join(root, name)) == "file"), None)


def read_split_file(root: str, storage: Storage) -> list[Example] | None:
    """Every image of a dataset in VisA's layout, None if the folder has no split file.

    Raises:
        GladError: the file lacks a column, is cut off or no text, or leads outside of the dataset's folder.
    """
    file = split_file(root, storage)
    if file is None:
        return None
    try:
        with clear_errors(file, storage):
            data = storage.read(file)
            for other in (join(root, name) for name in SPLIT_FILES):
                if storage.kind(other) == "file" and storage.read(other) != data:
                    raise GladError(f"{file}: is not the same as {other}; remove one of the two split files")
            columns, rows = csv_rows(data, SPLIT_COLUMNS, file, LeftOut())
    except UnicodeError as error:
        raise GladError(f"{file}: no text in UTF-8 or UTF-16; VisA's split file is expected") from error
    missing = SPLIT_COLUMNS - set(columns)
    if missing:
        raise GladError(f"{file}: lacks the column {', '.join(sorted(missing))}; VisA's split file is expected")
    examples: dict[str, Example] = {}
    for number, row in rows:
        if any(row.values()):
            line = f"{file}: line {number}"
            example = _split_example(row, root, line)
            examples[example.path] = _merged(examples.get(example.path), example, line)
    return list(examples.values())


def _split_example(row: dict[str, str], root: str, line: str) -> Example:
    if not row.get("image") or not row.keys() >= SPLIT_COLUMNS:
        raise GladError(f"{line} has too few columns; the file may be cut off")
    image, mask = (row[name].strip().replace("\\", "/") for name in ("image", "mask"))
    for path in (image, mask):
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise GladError(f"{line} leads outside of the dataset's folder: {path!r}")
    label, image = row["label"], str(PurePosixPath(image))  # without ./ and //
    masks = () if mask.casefold() in NO_MASK else (join(root, str(PurePosixPath(mask))),)
    split = SPLITS.get(row["split"].strip().casefold(), row["split"].strip().casefold())
    return Example(image, join(root, image), row["object"].strip(), split, not is_good(label), masks, label)


def _merged(first: Example | None, example: Example, line: str) -> Example:
    """An image that several rows name: once, with all their masks.

    Raises:
        GladError: they do not agree.
    """
    if first is None:
        return example
    for name, one, other in (
        ("object", first.category, example.category),
        ("split", first.split, example.split),
        ("label", first.kind if first.anomalous else "good", example.kind if example.anomalous else "good"),
    ):
        if one != other:
            raise GladError(f"{line} has the {name} '{other}' for {example.path}, a line before it '{one}'; correct it")
    return replace(first, masks=tuple(dict.fromkeys(first.masks + example.masks)), rows=first.rows + 1)
