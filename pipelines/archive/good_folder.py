"""A folder with good pictures directly in it: all that `glad train` needs, where there is no dataset."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from cluster.storage import Storage, join
from glad_core.decoding.picture import is_image
from glad_core.errors import GladError
from pipelines.archive.examples import SPLITS, is_bad, is_good
from pipelines.archive.mask_files import is_mask_folder, part_masks

LAYOUT = "CATEGORY/train/good/NAME.png (MVTec-AD's layout), or split_csv/1cls.csv (VisA's)"
# Of a category: not hidden, one folder's name, and no list of several.
NAME = re.compile(r"[^./\\,\x00-\x1f\x7f][^/\\,\x00-\x1f\x7f]*")
SHOWN = 5  # names in a message


def good_folder(
    root: str, category: str | None, storage: Storage, default: str, say: Callable[[str], None]
) -> dict[str, list[str]]:
    """URIs of the pictures directly in a folder that is no dataset, by the one category that they are of.

    Args:
        root: the folder, absolute.
        category: its name; None or ``all`` takes the folder's, or ``default`` if that only says that they are good.
        say: called with a line about what was taken for good, and what was left out.

    Raises:
        GladError: no picture, pictures in folders within, masks, names that mean defects, or a category of no use.
        StorageError: storage cannot be used.
    """
    files = [entry for entry in storage.level(root) if entry.size is not None and entry.problem is None]
    pictures, masks = part_masks([PurePosixPath(file.path) for file in files if is_image(file.path)])
    folders = [name for name in storage.folders(root) if not name.startswith(".")]
    filled = [name for name in folders if any(is_image(path) for path, _ in storage.walk(join(root, name), True))]
    if filled:
        raise GladError(
            f"{root}: the pictures in its folders {_some(filled)} may not all be good; {_advice(root, filled)}"
        )
    if not pictures:
        raise GladError(f"{root}: no pictures directly in it, and no dataset; expected are good pictures, or {LAYOUT}")
    if masks:
        raise GladError(f"{root}: {_some([file.name for file in masks])}: masks mark defects; {_advice(root, [])}")
    own, above = root.rstrip("/").rpartition("/")[2], root.rstrip("/").rpartition("/")[0].rpartition("/")[2]
    if not is_good(own) and (is_bad(own) or is_mask_folder(own) or _is_test(own) or _is_test(above)):
        raise GladError(f"{root}: by its name, not all of its pictures are good; rename it, or {_advice(root, [])}")
    if category in (None, "all"):
        category = default if default and (is_good(own) or own.casefold() in SPLITS) else own
    if category is None or not NAME.fullmatch(category):
        raise GladError(f"{root}: its pictures are of one category, which cannot be called '{category}': --category X")
    others = len(files) - len(pictures)
    rest = f"; {others} other files left out" if others else ""
    say(f"{len(pictures)} pictures in {root}, all taken for good ones of '{category}'{rest}")
    return {category: [join(root, str(picture)) for picture in sorted(pictures)]}


def _is_test(name: str) -> bool:
    return SPLITS.get(name.casefold()) == "test"


def _some(names: list[str]) -> str:
    return ", ".join([*names[:SHOWN], *(["…"] if len(names) > SHOWN else [])])


def _advice(root: str, folders: list[str]) -> str:
    good = next((f" such as {join(root, name)}," for name in folders if is_good(name)), "")
    return f"give a folder with good pictures alone,{good} or {LAYOUT}"
