"""The masks of anomalous images: where they are marked, and what is doubtful about that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from cluster.storage import Storage
from glad_core.decoding.opened import ImageError, orientation
from glad_core.decoding.picture import read_labels
from pipelines.archive.examples import Example
from pipelines.archive.fetch import fetch, neighbours

LOSSY = "lossy: cut at half of the highest value"
LEAST_TOP = 16  # highest value that compression or resampling leaves; class numbers are smaller
LEAST_VALUES = 2  # between background and mark that compression or resampling leaves
SMEARED = 0.2  # share of the pixels with such values; of 60 lossy masks at least .3, of 15 label images at most .06


class Mask(NamedTuple):
    """Where an anomalous image is anomalous, bool [H, W], what is doubtful about it, and whether its EXIF turns it."""

    marked: np.ndarray
    doubts: tuple[str, ...]
    turned: bool


def read_mask(example: Example, storage: Storage, examples: Sequence[Example]) -> Mask:
    """The masks of an anomalous image together.

    A mask is a label image: every pixel whose stored value is not 0 is marked, in any channel but alpha. Masks that
    were compressed (JPEG) or resampled are cut at half instead.

    Args:
        examples: of the dataset. If one of their images can be read and a mask cannot, the mask is at fault.

    Raises:
        ImageError: one is not readable. StorageError: nor are other images.
    """
    marked: np.ndarray | None = None
    turned = False
    doubts = dict.fromkeys(example.doubts)
    for uri in example.masks:
        data = fetch_from(uri, storage, examples)
        turned |= orientation(data) > 1
        one, lossy = marked_in(*read_labels(data))
        if lossy:
            doubts[LOSSY] = None
        if marked is not None and one.shape != marked.shape:
            doubts["masks of several sizes: stretched"] = None
            one = resize_mask(one, marked.shape)
        marked = one if marked is None else marked | one
    assert marked is not None
    if not marked.any():
        doubts["nothing is marked in it"] = None
    elif marked.mean() > 0.5:
        doubts[f"{marked.mean():.0%} of it is marked: is it inverted?"] = None
    return Mask(marked, tuple(doubts), turned)


def marked_in(raw: np.ndarray, lossy: bool) -> tuple[np.ndarray, bool]:
    """Marked pixels of a mask's stored values [H, W] or [H, W, C], bool [H, W]; and whether they were cut at half.

    Args:
        lossy: the file's compression is. Otherwise the values say whether they were compressed or resampled before.
    """
    if raw.ndim == 3 and raw.shape[2] in (2, 4):  # alpha says nothing, unless it is all that differs
        colours, alpha = raw[..., :-1], raw[..., -1]
        raw = alpha if (colours == colours[0, 0]).all() and alpha.min() < alpha.max() else colours
    values = np.nan_to_num(raw if raw.ndim == 2 else raw.max(axis=2))
    if not values.any() or not (lossy or is_smeared(values)):
        return values != 0, False
    return values > values.max() / 2, True


def is_smeared(values_HW: np.ndarray) -> bool:
    """Whether values between background and mark come from compression or resampling, and are no labels.

    A label fills an area or a line, with nothing or with other areas beside it. What is smeared lies between two other
    values: it has neighbours of another value that are not 0, and is not part of four equal pixels.
    """
    top = values_HW.max()
    values_HW = _unrepeated(values_HW)
    if values_HW.dtype.kind in "iu" and top < LEAST_TOP:
        return False
    upper, counts = np.unique(values_HW[values_HW > top / 2], return_counts=True)
    between = (values_HW != 0) & (values_HW != upper[counts.argmax()])
    if len(np.unique(values_HW[between])) < LEAST_VALUES:
        return False
    differing, flat = np.zeros_like(between), np.zeros_like(between)
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        one, other = values_HW[here], values_HW[there]
        pairs = (one != other) & (one != 0) & (other != 0)
        differing[here] |= pairs
        differing[there] |= pairs
    same_row = values_HW[:, 1:] == values_HW[:, :-1]
    squares = same_row[1:] & same_row[:-1] & (values_HW[1:, 1:] == values_HW[:-1, 1:])
    for down in (0, 1):
        for right in (0, 1):
            flat[down : down + squares.shape[0], right : right + squares.shape[1]] |= squares
    return bool((differing & ~flat)[between].mean() > SMEARED)


def _unrepeated(values_HW: np.ndarray) -> np.ndarray:
    """The values before an enlargement that repeated every row and column."""
    for _ in range(2):
        changes = np.flatnonzero((values_HW[1:] != values_HW[:-1]).any(axis=1)) + 1
        values_HW = values_HW[:: np.gcd.reduce([*changes, len(values_HW)])].T
    return values_HW


def fetch_from(uri: str, storage: Storage, examples: Sequence[Example]) -> bytes:
    """The bytes of a dataset's image or mask. If no other image can be read either, the storage is at fault.

    Raises:
        ImageError: it is at fault. StorageError: the storage is.
    """
    return fetch(storage, {"uri": uri}, lambda: neighbours({"uri": uri}, [{"uri": other.uri} for other in examples]))


def marks(uri: str, storage: Storage, examples: Sequence[Example]) -> bool:
    """Whether a mask that does not count marks anything. Black ones lose nothing; unreadable ones may."""
    try:
        return bool(marked_in(*read_labels(fetch_from(uri, storage, examples)))[0].any())
    except ImageError:
        return True


def resize_mask(mask_HW: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """bool [H, W] to bool of ``size`` (height, width), nearest pixel. If that leaves no mark, every pixel with one."""
    small = np.array(Image.fromarray(mask_HW).resize((size[1], size[0]), Image.Resampling.NEAREST))
    if not small.any():
        rows, columns = np.nonzero(mask_HW)
        small[rows * size[0] // mask_HW.shape[0], columns * size[1] // mask_HW.shape[1]] = True
    return small
