"""The good images that training starts from: those of a dataset, corrected by reviewers' feedback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive import layouts
from pipelines.runs.feedback import require_marks
from pipelines.runs.run import Run


@dataclass(frozen=True)
class GoodImage:
    """One good training image; ``digest`` is the sha256 of its decoded pixels, empty before the survey."""

    uri: str
    category: str
    digest: str = ""


def good_images(
    dataset: str,
    category: str | None,
    storage: Storage,
    default: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[GoodImage]]:
    """Good training images by category, of a dataset in MVTec-AD's or VisA's layout or of one category's folder.

    Args:
        category: one, several with commas between, ``all``, or None if there is only one.
        default, say: see `layouts.good_images`.

    Raises:
        GladError: no such folder or category, or fewer than two images in one.
        StorageError: storage cannot be used.
    """
    uris = layouts.good_images(dataset, category, storage, default, say)
    for name, images in uris.items():
        if len(images) < 2:
            raise GladError(f"{dataset}: {len(images)} good images of '{name}'; at least two are needed, better 50")
    return {name: [GoodImage(uri, name) for uri in images] for name, images in uris.items()}


def apply_feedback(
    images: dict[str, list[GoodImage]], exclude: str | None, include: str | None, storage: Storage
) -> tuple[dict[str, list[GoodImage]], str]:
    """Good images after applying reviewers' feedback, and a one-line summary of the changes.

    Args:
        exclude: run whose confirmed anomalies are removed.
        include: run whose false alarms are added, to the category they were judged as (the only one, if there is one).

    Raises:
        GladError: a run without feedback, or too few images left.
    """
    if exclude is None and include is None:
        return images, ""
    confirmed = {row["uri"] for row in _marked(exclude, "confirmed", storage)}
    kept = {name: [image for image in members if image.uri not in confirmed] for name, members in images.items()}
    removed = sum(map(len, images.values())) - sum(map(len, kept.values()))
    known = {image.uri for members in images.values() for image in members}
    added, unusable = 0, 0
    for row in _marked(include, "false_alarm", storage):
        category = next(iter(images)) if len(images) == 1 else row["category"]
        if row["uri"] in known | confirmed:
            continue
        if category not in kept or row["uri"].startswith("tar://") or "-" in row["image_id"]:
            unusable += 1
            continue
        kept[category].append(GoodImage(row["uri"], category))
        added += 1
    for name, members in kept.items():
        if len(members) < 2:
            raise GladError(
                f"{name}: {len(members)} good images left without those confirmed as anomalous; two are needed"
            )
    line = f"feedback: {removed} good images left out, {added} added"
    return kept, line + (
        f", {unusable} of another category, inside a tar or on a further page not added" if unusable else ""
    )


def _marked(run: str | None, verdict: str, storage: Storage) -> list[dict[str, Any]]:
    marks = [] if run is None else require_marks(Run.at(run, storage))
    return sorted((row for row in marks if row["verdict"] == verdict), key=lambda row: row["uri"])
