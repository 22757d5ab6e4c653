"""The layouts of datasets, read in one place for scoring, training, evaluation and `glad datasets check`.

MVTec-AD (also MPDD):         CATEGORY/train/good/NAME.png
                              CATEGORY/test/DEFECT/NAME.png    CATEGORY/ground_truth/DEFECT/NAME[_mask].png
VisA and PCB-Bank:            split_csv/1cls.csv or 1cls.csv with the columns object, split, label, image, mask;
                              image and mask are paths from the dataset's folder
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster.storage import Storage, StorageError, absolute, clear_errors, is_s3, join
from glad_core.errors import GladError, did_you_mean
from pipelines.archive.picture import is_image

SPLIT_FILES = ("split_csv/1cls.csv", "1cls.csv")
SPLIT_COLUMNS = {"object", "split", "label", "image", "mask"}


@dataclass(frozen=True)
class Example:
    """One image of a dataset.

    ``path`` ends the URI of its scored result; ``split`` is train or test; ``mask`` is a URI, None if there is none.
    """

    path: str
    uri: str
    category: str
    split: str
    anomalous: bool
    mask: str | None


def category_folders(location: str, storage: Storage, needed: Collection[str] = ("train", "test")) -> dict[str, str]:
    """The folders of MVTec-AD categories by name: ``location`` itself, or folders directly in it; {} if there are none.

    Args:
        needed: the folders that make a folder a category's.
    """

    def is_category(folder: str) -> bool:
        try:
            return all(storage.kind(join(folder, name)) == "folder" for name in needed)
        except StorageError:
            if is_s3(folder):
                raise
            return False  # a folder that cannot be opened; its errors are listed

    if is_category(location):
        return {location.rpartition("/")[2]: location}
    folders = {name: join(location, name) for name in storage.folders(location)}
    return {name: folder for name, folder in folders.items() if is_category(folder)}


def choose_category(known: Collection[str], category: str | None, location: str) -> str:
    """The one category that is meant, by name or because there is no other.

    Raises:
        GladError: unknown, or several and none chosen.
    """
    if category is None:
        if len(known) > 1:
            raise GladError(
                f"{location} holds {len(known)} categories ({', '.join(known)}): choose one with --category"
            )
        return next(iter(known))
    if category not in known:
        raise GladError(f"{location} has no category '{category}'{did_you_mean(category, known)}")
    return category


def read_dataset(location: str, storage: Storage) -> list[Example]:
    """Every image of a dataset, train and test.

    Raises:
        GladError: no dataset of a known layout there. StorageError: storage cannot be used.
    """
    root = absolute(location)
    if storage.kind(root) != "folder":
        raise GladError(f"{root}: no such dataset folder")
    examples = read_split_file(root, storage)
    if examples is not None:
        return examples
    folders = category_folders(root, storage)
    examples = [example for name, folder in folders.items() for example in _mvtec_examples(name, folder, storage)]
    if not examples:
        raise GladError(
            f"{root}: no dataset there; known are MVTec-AD's layout (CATEGORY/train, CATEGORY/test, "
            "CATEGORY/ground_truth) and VisA's (split_csv/1cls.csv)"
        )
    return examples


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
            rows = csv.DictReader(io.StringIO(storage.read(file).decode("utf-8-sig")))
        missing = SPLIT_COLUMNS - set(rows.fieldnames or [])
        if missing:
            raise GladError(f"{file}: lacks the column {', '.join(sorted(missing))}; VisA's split file is expected")
        return [_split_example(row, root, f"{file}: line {rows.line_num}") for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise GladError(f"{file}: not a UTF-8 text file; VisA's split file is expected") from error


def _split_example(row: dict[str, str | None], root: str, line: str) -> Example:
    image, mask = row["image"], row["mask"]
    if not image or mask is None:
        raise GladError(f"{line} has too few columns; the file may be cut off")
    for path in (image, mask):
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise GladError(f"{line} leads outside of the dataset's folder: {path!r}")
    anomalous = row["label"] != "normal"
    uri, mask_uri = join(root, image), join(root, mask) if anomalous and mask else None
    return Example(image, uri, row["object"] or "", row["split"] or "", anomalous, mask_uri)


def good_images(location: str, category: str | None, storage: Storage) -> dict[str, list[str]]:
    """URIs of the good training images by category. A folder with nothing but train/good in it is a category's as well.

    Args:
        category: one, several with commas between, ``all``, or None if there is only one.

    Raises:
        GladError: no such folder, no training images, unknown category, or several and none chosen.
        StorageError: storage cannot be used.
    """
    root = absolute(location)
    if storage.kind(root) != "folder":
        raise GladError(f"{root}: no such dataset folder")
    examples = read_split_file(root, storage)
    if examples is not None:
        good = [example for example in examples if example.split == "train" and not example.anomalous]
        uris: dict[str, list[str]] = {}
        for example in good:
            uris.setdefault(example.category, []).append(example.uri)
        if not uris:
            raise GladError(f"{root}: its split file names no good training image")
        return {name: uris[name] for name in _choose_several(uris, category, root)}
    folders = category_folders(root, storage, needed=("train/good",))
    if not folders:
        raise GladError(f"{root}: no category with train/good in it; MVTec-AD's layout is expected, or VisA's")
    chosen = {name: join(folders[name], "train/good") for name in _choose_several(folders, category, root)}
    return {
        name: [join(folder, path) for path, _ in storage.walk(folder, follow=True) if is_image(path)]
        for name, folder in chosen.items()
    }


def _choose_several(known: Collection[str], category: str | None, location: str) -> list[str]:
    if category == "all":
        return list(known)
    names: list[str | None] = [None] if category is None else [name.strip() for name in category.split(",")]
    return [choose_category(known, name, location) for name in names]


def _mvtec_examples(category: str, folder: str, storage: Storage) -> Iterator[Example]:
    masks: dict[tuple[str, str], str] = {}
    truth = join(folder, "ground_truth")
    if storage.kind(truth) == "folder":
        for path, _ in storage.walk(truth, follow=True):
            file = PurePosixPath(path)
            masks[str(file.parent), file.stem.removesuffix("_mask")] = join(truth, path)
    for split in ("train", "test"):
        for path, _ in storage.walk(join(folder, split), follow=True):
            if not is_image(path):
                continue
            file = PurePosixPath(path)
            good = file.parts[0] == "good"
            mask = None if good else masks.get((str(file.parent), file.stem))
            yield Example(f"{category}/{split}/{path}", join(folder, split, path), category, split, not good, mask)
