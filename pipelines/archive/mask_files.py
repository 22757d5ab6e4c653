"""Masks among the files of a dataset in MVTec-AD's layout: which files are masks, and of which pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from glad_core.decoding.picture import is_image

# Folders of masks within a split's folder (MVTec AD 2 has them there), and beside those of the splits.
INNER_FOLDERS = {"ground_truth", "groundtruth", "gt", "masks"}
MASK_FOLDERS = {*INNER_FOLDERS, "mask", "labels", "label"}
# What is put before or after a picture's name to name its mask: the first words also beside the picture.
SURE, WORDS = "mask|gt|ground_?truth", "mask|gt|ground_?truth|seg|label"
AFFIX, SURE_AFFIX = (
    re.compile(rf"[ _.-]({words})([ _-]?\d+)?$|^({words})[ _.-](?=.)", re.IGNORECASE) for words in (WORDS, SURE)
)
PICTURE_FOLDERS = {"images", "image", "imgs", "img"}
Key = tuple[str, str]


class MaskFile(NamedTuple):
    """A mask: its path as if it lay in a folder of masks, its URI, and the split's folder that it belongs to."""

    path: PurePosixPath
    uri: str
    split: str | None = None


class PictureFile(NamedTuple):
    """A picture: the name of its split's folder, and its path in there."""

    split: str
    path: PurePosixPath


def is_mask_folder(name: str, names: Iterable[str] = MASK_FOLDERS) -> bool:
    """Whether a folder of this name holds masks; blanks and hyphens count as underscores."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold()) in names


def in_mask_folder(path: PurePosixPath) -> bool:
    """Whether a file below a split's folder lies in a folder of masks there."""
    return any(is_mask_folder(name, INNER_FOLDERS) for name in path.parts[:-1])


def named_picture(stem: str) -> str | None:
    """The name, in lower case, of the picture that a file beside it could be the mask of; None if it is called none."""
    bare = SURE_AFFIX.sub("", stem)
    return plain(bare) if bare != stem else None


def part_masks(files: Iterable[PurePosixPath]) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Pictures and masks among the images below a split's folder: masks are in folders of their own or named so."""
    outer = [file for file in files if not in_mask_folder(file)]
    known = {(file.parent, plain(file.stem)) for file in outer}
    beside = {file for file in outer if (file.parent, named_picture(file.stem)) in known}
    return [file for file in outer if file not in beside], [
        file for file in files if in_mask_folder(file) or file in beside
    ]


def without_mask_folders(path: PurePosixPath) -> PurePosixPath:
    """The path of a mask as if its folder of masks were not there."""
    return PurePosixPath(*[name for name in path.parts[:-1] if not is_mask_folder(name, INNER_FOLDERS)], path.name)


def _key(file: PurePosixPath) -> Key:
    """What a picture and its mask have in common: folder and name, in any case and (macOS) any form of Unicode.

    A folder ``images`` beside one of masks counts for nothing.
    """
    parent = PurePosixPath(*[name for name in file.parts[:-1] if name.casefold() not in PICTURE_FOLDERS])
    return plain(str(parent)), plain(file.stem)


def plain(name: str) -> str:
    """A name as it is compared with others: in lower case, every letter one character."""
    return unicodedata.normalize("NFC", name).casefold()


def _on_one_line(one: str, other: str) -> bool:
    """Whether one folder is the other, or above it."""
    paths = PurePosixPath(one), PurePosixPath(other)
    return paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0])


class Owners:
    """Finds the pictures of masks among ``anomalous`` ones and good ones, each by folder and name, in any case."""

    def __init__(self, pictures: Iterable[PictureFile], anomalous: Iterable[PictureFile]) -> None:
        self.by_key: dict[Key, list[PictureFile]] = {}
        self.by_stem: dict[str, list[PictureFile]] = {}
        for picture in pictures:
            self.by_key.setdefault(_key(picture.path), []).append(picture)
        for picture in anomalous:
            self.by_stem.setdefault(plain(picture.path.stem), []).append(picture)

    def of(self, mask: MaskFile) -> list[PictureFile]:
        """The pictures of a mask's name, else of that without _mask, else (MVTec LOCO) of its folder's name.

        The name may hold the picture's suffix. A mask may also be of the only anomalous picture of its name in folders
        above or below. More than one: the name does not say which it is.
        """
        parent, stem = _key(mask.path)
        stems = (stem, AFFIX.sub("", stem))
        for name in stems:
            if found := self._named(parent, name, mask.split):
                return found
        if found := self._in_split(self.by_key.get(_key(mask.path.parent), []), mask.split):
            return found
        for name in stems:
            found = self._in_split(self.by_stem.get(name, []), mask.split)
            found = [picture for picture in found if _on_one_line(_key(picture.path)[0], parent)]
            if len(found) == 1:
                return found
        return []

    def _named(self, parent: str, name: str, split: str | None) -> list[PictureFile]:
        found = self.by_key.get((parent, name), [])
        if not found and is_image(name):
            candidates = self.by_key.get((parent, PurePosixPath(name).stem), [])
            found = [picture for picture in candidates if plain(picture.path.name) == name]
        return self._in_split(found, split)

    @staticmethod
    def _in_split(pictures: Sequence[PictureFile], split: str | None) -> list[PictureFile]:
        return [picture for picture in pictures if split in (None, picture.split)]
