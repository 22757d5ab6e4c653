"""The layouts of datasets, read in one place for scoring, training, evaluation and `glad datasets check`.

MVTec-AD (also MPDD):         CATEGORY/train/good/NAME.png
                              CATEGORY/test/DEFECT/NAME.png    CATEGORY/ground_truth/DEFECT/NAME[_mask].png
MVTec LOCO:                   the same, with CATEGORY/validation/good, and the masks of an image in a folder of its name
MVTec AD 2:                   the same, with CATEGORY/test_public/DEFECT and CATEGORY/test_public/ground_truth/DEFECT
a plain folder:               NAME.png, good ones alone, for training (`good_folder`)
VisA and PCB-Bank:            split_csv/1cls.csv or 1cls.csv with the columns object, split, label, image, mask;
                              image and mask are paths from the dataset's folder
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import PurePosixPath

from cluster.storage import Storage, StorageError, absolute, is_s3, join
from glad_core.decoding.picture import is_image
from glad_core.errors import GladError, did_you_mean
from pipelines.archive.examples import SPLITS, Dataset, Example, is_good
from pipelines.archive.good_folder import LAYOUT, good_folder
from pipelines.archive.mask_files import (
    MaskFile,
    Owners,
    PictureFile,
    is_mask_folder,
    part_masks,
    without_mask_folders,
)
from pipelines.archive.split_file import read_split_file

SHARED = "its mask may be of another image of the same name: name it with the suffix, such as a.jpg_mask.png"
MOST_CATEGORIES = 50  # looked into to name a layout that is not read


def category_folders(location: str, storage: Storage, needed: Collection[str] = ("train", "test")) -> dict[str, str]:
    """The folders of MVTec-AD categories by name: ``location`` itself, or folders directly in it; {} if there are none.

    Args:
        needed: the folders that make a folder a category's.
    """

    def is_category(folder: str) -> bool:
        try:
            return all(split_folders(folder, name, storage) for name in needed)
        except StorageError:
            if is_s3(folder):
                raise
            return False  # a folder that cannot be opened; its errors are listed

    if is_category(location):
        return {location.rpartition("/")[2]: location}
    folders = {name: join(location, name) for name in storage.folders(location)}
    return {name: folder for name, folder in folders.items() if is_category(folder)}


def split_folders(category: str, split: str, storage: Storage) -> list[str]:
    """The folders of a split in a category's folder, written test, Test or TEST, or (MVTec AD 2) test_public."""
    names = [name for name, meant in SPLITS.items() if meant == split]
    spellings = (join(category, word) for name in names for word in (name, name.capitalize(), name.upper()))
    if all(storage.kind(folder) != "folder" for folder in spellings):
        return []  # without a look at what may be a large folder
    return [join(category, name) for name in storage.folders(category) if SPLITS.get(name.casefold()) == split]


def _train_good(category: str, storage: Storage) -> list[str]:
    """The folders of good training images in a category's folder."""
    trains = split_folders(category, "train", storage)
    return [join(train, name) for train in trains for name in storage.folders(train) if is_good(name)]


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
    """Every image of a dataset, train and test. Raises as `read_whole`."""
    return read_whole(location, storage).examples


def read_whole(location: str, storage: Storage) -> Dataset:
    """Every image of a dataset, and what else is in its folder.

    Raises:
        GladError: no dataset of a known layout there. StorageError: storage cannot be used.
    """
    root = absolute(location)
    if storage.kind(root) != "folder":
        raise GladError(f"{root}: no such dataset folder")
    examples = read_split_file(root, storage)
    if examples is not None:
        return Dataset(examples, [], [])
    folders = category_folders(root, storage, needed=("test",))  # a test set may stand alone
    parts = [_read_category(name, folder, storage) for name, folder in folders.items()]
    whole = Dataset(
        [example for part in parts for example in part.examples],
        [mask for part in parts for mask in part.orphans],
        [folder for part in parts for folder in part.others],
    )
    if not whole.examples:
        _refuse_real_iad(root, storage)
        raise GladError(
            f"{root}: no dataset there; known are MVTec-AD's layout (CATEGORY/train, CATEGORY/test, "
            "CATEGORY/ground_truth) and VisA's (split_csv/1cls.csv)"
        )
    return whole


def is_real_iad(root: str, storage: Storage) -> bool:
    """Whether a folder or one in it is called Real-IAD, in whose layout json files say what is which."""
    names = [root.rpartition("/")[2], *storage.folders(root)]
    return any(re.sub(r"[\s_-]", "", name.casefold()).startswith("realiad") for name in names)


def _refuse_real_iad(root: str, storage: Storage) -> None:
    places = [root, *(join(root, name) for name in storage.folders(root)[:MOST_CATEGORIES])]
    split_so = any(all(storage.kind(join(place, name)) == "folder" for name in ("OK", "NG")) for place in places)
    if split_so or is_real_iad(root, storage):
        raise GladError(
            f"{root}: Real-IAD's layout (folders OK and NG, json files) is not read; copy or link its pictures into "
            "CATEGORY/train/good, CATEGORY/test/DEFECT and CATEGORY/ground_truth/DEFECT"
        )


def good_images(
    location: str,
    category: str | None,
    storage: Storage,
    default: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[str]]:
    """URIs of the good training images by category. A folder with nothing but train/good in it is a category's as well.

    So is a folder with pictures directly in it, of which ``say`` gets a line.

    Args:
        category: one, several with commas between, ``all``, or None if there is only one.
        default: the category of pictures directly in a folder that has a name like good.

    Raises:
        GladError: no such folder, no training images, unknown category, or several and none chosen.
        StorageError: storage cannot be used.
    """
    root = absolute(location)
    if storage.kind(root) != "folder":
        raise GladError(f"{root}: no such dataset folder; expected is a folder with good pictures, or with {LAYOUT}")
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
        _refuse_real_iad(root, storage)
        return good_folder(root, category, storage, default, say)
    return {
        name: [
            join(folder, str(picture))
            for folder in by_category[name]
            for picture in part_masks(_images_below(folder, storage))[0]
        ]
        for name in _choose_several(by_category, category, root)
    }


def _images_below(folder: str, storage: Storage) -> list[PurePosixPath]:
    return [PurePosixPath(path) for path, _ in storage.walk(folder, follow=True) if is_image(path)]


def _choose_several(known: Collection[str], category: str | None, location: str) -> list[str]:
    if category == "all":
        return list(known)
    if category is not None and category in known:  # it may have a comma
        return [category]
    names: list[str | None] = [None] if category is None else [name.strip() for name in category.split(",")]
    return [choose_category(known, name, location) for name in names]


def _read_category(category: str, folder: str, storage: Storage) -> Dataset:
    """A category's folder in MVTec-AD's layout."""
    names = storage.folders(folder)
    masks: list[MaskFile] = []
    pictures: list[PictureFile] = []
    for name in names:
        if name.casefold() in SPLITS:
            found, inner = part_masks(_images_below(join(folder, name), storage))
            pictures += [PictureFile(name, file) for file in found]
            masks += [MaskFile(without_mask_folders(file), join(folder, name, str(file)), name) for file in inner]
        elif is_mask_folder(name):
            masks += [
                MaskFile(file, join(folder, name, str(file))) for file in _images_below(join(folder, name), storage)
            ]
    owners = Owners(pictures, [picture for picture in pictures if not _is_good_picture(picture)])
    by_picture: dict[PictureFile, list[MaskFile]] = {}
    shared: set[PictureFile] = set()
    orphans = []
    for mask in sorted(masks):
        found_pictures = owners.of(mask)
        for picture in found_pictures:
            by_picture.setdefault(picture, []).append(mask)
        shared.update(found_pictures if len(found_pictures) > 1 else ())
        orphans += [] if found_pictures else [mask.uri]
    examples = [
        Example(
            f"{category}/{picture.split}/{picture.path}",
            join(folder, picture.split, str(picture.path)),
            category,
            SPLITS[picture.split.casefold()],
            not _is_good_picture(picture),
            tuple(mask.uri for mask in by_picture.get(picture, [])),
            _kind(picture),
            doubts=(SHARED,) if picture in shared else (),
        )
        for picture in pictures
    ]
    others = [join(folder, name) for name in names if name.casefold() not in SPLITS and not is_mask_folder(name)]
    return Dataset(examples, orphans, others)


def _kind(picture: PictureFile) -> str:
    return picture.path.parts[0] if len(picture.path.parts) > 1 else ""


def _is_good_picture(picture: PictureFile) -> bool:
    return is_good(_kind(picture))
