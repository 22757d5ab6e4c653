"""The layouts of datasets, read in one place for scoring, training, evaluation and `glad datasets check`.

MVTec-AD (also MPDD):         CATEGORY/train/good/NAME.png
                              CATEGORY/test/DEFECT/NAME.png    CATEGORY/ground_truth/DEFECT/NAME[_mask].png
MVTec LOCO:                   the same, with CATEGORY/validation/good, and the masks of an image in a folder of its name
VisA and PCB-Bank:            split_csv/1cls.csv or 1cls.csv with the columns object, split, label, image, mask;
                              image and mask are paths from the dataset's folder
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster.storage import Storage, StorageError, absolute, clear_errors, is_s3, join
from glad_core.errors import GladError, did_you_mean
from pipelines.archive.picture import is_image
from pipelines.archive.rows import LeftOut
from pipelines.archive.uri_list import csv_rows

SPLIT_FILES = ("split_csv/1cls.csv", "1cls.csv")
SPLIT_COLUMNS = {"object", "split", "label", "image", "mask"}
# Names of folders and labels that mean good images, whatever their case; blanks and hyphens count as underscores.
GOOD_NAMES = {
    *("good", "ok", "normal", "0", "pass", "passed", "undamaged", "non_defective", "nondefective"),
    *("anomaly_free", "defect_free", "no_anomaly", "no_defect", "no_defects", "nodefect"),
}
SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation", "valid": "validation"}
Key = tuple[str, str]
MASK_SUFFIX = re.compile(r"_(mask|gt|seg|label)([_-]?\d+)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Example:
    """One image of a dataset.

    ``path`` ends the URI of its scored result; ``split`` is train, test or validation. ``masks`` are URIs, all of which
    count; there may be none. ``kind`` is the folder or label that said whether it is good.
    """

    path: str
    uri: str
    category: str
    split: str
    anomalous: bool
    masks: tuple[str, ...]
    kind: str = ""


def is_good(name: str) -> bool:
    """Whether a folder or label of this name means good images."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold()) in GOOD_NAMES


def category_folders(location: str, storage: Storage, needed: Collection[str] = ("train", "test")) -> dict[str, str]:
    """The folders of MVTec-AD categories by name: ``location`` itself, or folders directly in it; {} if there are none.

    Args:
        needed: the folders that make a folder a category's.
    """

    def is_category(folder: str) -> bool:
        try:
            return all(split_folder(folder, name, storage) is not None for name in needed)
        except StorageError:
            if is_s3(folder):
                raise
            return False  # a folder that cannot be opened; its errors are listed

    if is_category(location):
        return {location.rpartition("/")[2]: location}
    folders = {name: join(location, name) for name in storage.folders(location)}
    return {name: folder for name, folder in folders.items() if is_category(folder)}


def split_folder(category: str, split: str, storage: Storage) -> str | None:
    """The folder of a split in a category's folder, written train, Train or TRAIN; None if there is none."""
    spellings = (join(category, name) for name in (split, split.capitalize(), split.upper()))
    return next((folder for folder in spellings if storage.kind(folder) == "folder"), None)


def _train_good(category: str, storage: Storage) -> list[str]:
    """The folders of good training images in a category's folder."""
    train = split_folder(category, "train", storage)
    if train is None:
        return []
    return [join(train, name) for name in storage.folders(train) if is_good(name)]


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
    folders = category_folders(root, storage, needed=("test",))  # a test set may stand alone
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
            columns, rows = csv_rows(storage.read(file), SPLIT_COLUMNS, file, LeftOut())
    except UnicodeError as error:
        raise GladError(f"{file}: no text in UTF-8 or UTF-16; VisA's split file is expected") from error
    missing = SPLIT_COLUMNS - set(columns)
    if missing:
        raise GladError(f"{file}: lacks the column {', '.join(sorted(missing))}; VisA's split file is expected")
    return [_split_example(row, root, f"{file}: line {number}") for number, row in rows if any(row.values())]


def _split_example(row: dict[str, str], root: str, line: str) -> Example:
    if not row.get("image") or not row.keys() >= SPLIT_COLUMNS:
        raise GladError(f"{line} has too few columns; the file may be cut off")
    image, mask = (row[name].strip().replace("\\", "/") for name in ("image", "mask"))
    for path in (image, mask):
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise GladError(f"{line} leads outside of the dataset's folder: {path!r}")
    label = row["label"]
    masks = (join(root, mask),) if mask else ()
    split = SPLITS.get(row["split"].strip().casefold(), row["split"].strip().casefold())
    return Example(image, join(root, image), row["object"].strip(), split, not is_good(label), masks, label)


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
    by_category = {
        name: train
        for name, folder in category_folders(root, storage, needed=("train",)).items()
        if (train := _train_good(folder, storage))
    }
    if not by_category:
        raise GladError(f"{root}: no category with train/good in it; MVTec-AD's layout is expected, or VisA's")
    return {
        name: [
            join(folder, path)
            for folder in by_category[name]
            for path, _ in storage.walk(folder, follow=True)
            if is_image(path)
        ]
        for name in _choose_several(by_category, category, root)
    }


def _choose_several(known: Collection[str], category: str | None, location: str) -> list[str]:
    if category == "all":
        return list(known)
    if category is not None and category in known:  # it may have a comma
        return [category]
    names: list[str | None] = [None] if category is None else [name.strip() for name in category.split(",")]
    return [choose_category(known, name, location) for name in names]


def _mvtec_examples(category: str, folder: str, storage: Storage) -> Iterator[Example]:
    names = {name.casefold(): name for name in storage.folders(folder)}
    images = [
        (name, PurePosixPath(path))
        for name in SPLITS
        if name in names
        for path, _ in storage.walk(join(folder, names[name]), follow=True)
        if is_image(path)
    ]
    masks: dict[Key, list[str]] = {}
    pictures = {_key(file) for _, file in images}
    for file, uri in _mask_files(folder, names, storage):
        masks.setdefault(_owner(file, pictures), []).append(uri)
    for name, file in images:
        kind = file.parts[0] if len(file.parts) > 1 else ""
        found = () if is_good(kind) else tuple(masks.get(_key(file), ()))
        path = f"{category}/{names[name]}/{file}"
        uri = join(folder, names[name], str(file))
        yield Example(path, uri, category, SPLITS[name], not is_good(kind), found, kind)


def _mask_files(folder: str, names: dict[str, str], storage: Storage) -> list[tuple[PurePosixPath, str]]:
    """The masks of a category by path and URI, in order."""
    truth = join(folder, names.get("ground_truth", "ground_truth"))
    if storage.kind(truth) != "folder":
        return []
    paths = sorted(path for path, _ in storage.walk(truth, follow=True) if is_image(path))
    return [(PurePosixPath(path), join(truth, path)) for path in paths]


def _key(file: PurePosixPath) -> Key:
    """What a picture and its mask have in common: folder and name, in any case."""
    return str(file.parent).casefold(), file.stem.casefold()


def _owner(mask: PurePosixPath, pictures: Collection[Key]) -> Key:
    """The picture a mask is of: of its name, else of that without _mask, else (MVTec LOCO) of its folder's name."""
    parent, stem = _key(mask)
    candidates = [(parent, stem), (parent, MASK_SUFFIX.sub("", stem)), _key(mask.parent)]
    return next((key for key in candidates if key in pictures), candidates[1])


def unused_masks(location: str, examples: Collection[Example], storage: Storage) -> list[str]:
    """Masks of a dataset in MVTec-AD's layout that no image has."""
    used = {mask for example in examples for mask in example.masks}
    folders = category_folders(absolute(location), storage, needed=("test",)).values()
    found = [
        uri
        for folder in folders
        for _, uri in _mask_files(folder, {name.casefold(): name for name in storage.folders(folder)}, storage)
    ]
    return [uri for uri in found if uri not in used]
