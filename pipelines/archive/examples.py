"""The images of a dataset as every layout gives them, and the words that say what they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

# Names of folders and labels that mean good images, whatever their case; blanks and hyphens count as underscores.
GOOD_NAMES = {
    *("good", "ok", "normal", "0", "pass", "passed", "undamaged", "non_defective", "nondefective"),
    *("anomaly_free", "defect_free", "no_anomaly", "no_defect", "no_defects", "nodefect"),
}
# The same for anomalous ones; any other name may mean anything.
BAD_NAMES = {
    *("bad", "ng", "nok", "not_ok", "not_good", "1", "fail", "failed", "reject", "rejects", "rejected", "scrap"),
    *("anomaly", "anomalies", "anomalous", "abnormal", "broken", "damaged", "faulty", "faults"),
    *("defect", "defects", "defective"),
}
SPLITS = {
    **{"train": "train", "test": "test", "test_public": "test"},
    **{"validation": "validation", "val": "validation", "valid": "validation"},
}


@dataclass(frozen=True)
class Example:
    """One image of a dataset.

    ``path`` ends the URI of its scored result; ``split`` is train, test or validation. ``masks`` are URIs, all of which
    count if the image is anomalous; there may be none. ``kind`` is the folder or label that said whether it is good.
    ``rows`` of a split file name it. ``doubts`` say what is not certain about its masks.
    """

    path: str
    uri: str
    category: str
    split: str
    anomalous: bool
    masks: tuple[str, ...]
    kind: str = ""
    rows: int = 1
    doubts: tuple[str, ...] = ()


class Dataset(NamedTuple):
    """What a dataset's folder holds: its images, masks that no image has, and folders that belong to no split."""

    examples: list[Example]
    orphans: list[str]
    others: list[str]


def is_good(name: str) -> bool:
    """Whether a folder or label of this name means good images."""
    return _plain(name) in GOOD_NAMES


def is_bad(name: str) -> bool:
    """Whether a folder of this name means anomalous images."""
    return _plain(name) in BAD_NAMES


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().casefold())
