"""A model registry in plain storage: bundles in REGISTRY/<category>/<version>/, and REGISTRY/<category>/current.json.

A version is named by its bundle's model id, so its content never changes. ``current.json`` names the version that
scores and the earlier ones, newest first; it is replaced as a whole.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import Storage, absolute, is_s3, join
from glad_core.bundle.glad_json import GLAD_JSON, Description, parse_description, read_description
from glad_core.errors import GladError, did_you_mean

CURRENT = "current.json"
# A category's or a version's folder: one name, not hidden, that leads nowhere else. ("/" and control characters apart,
# a category may have any name; "\\" separates folders for some programs.)
NAME = r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Current(BaseModel):
    """The version that scores a category, since when (ISO 8601, UTC) and why, and the earlier ones, newest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Name
    since: str
    reason: str
    earlier: list[Name]


def is_registry(location: str, storage: Storage) -> bool:
    """Whether a folder is no bundle and holds at least one category with a current version."""
    if storage.kind(join(location, GLAD_JSON)) == "file":
        return False
    return any(storage.kind(join(location, name, CURRENT)) == "file" for name in _folders(location, storage))


def categories(registry: str, storage: Storage) -> list[str]:
    """Categories with at least one version.

    Raises:
        GladError: no such registry.
    """
    names = [name for name in _folders(registry, storage) if versions(registry, name, storage)]
    if not names:
        raise GladError(f"{registry}: no model registry there; `glad retrain` makes one")
    return names


def versions(registry: str, category: str, storage: Storage) -> list[str]:
    """Complete versions of a category, sorted. (A bundle's description is its last file to arrive.)"""
    folder = inside(registry, category)
    return [name for name in _folders(folder, storage) if storage.kind(join(folder, name, GLAD_JSON)) == "file"]


def description(registry: str, category: str, version: str, storage: Storage) -> Description:
    """``glad.json`` of a version.

    Raises:
        GladError: no such version, or a damaged description.
    """
    names = versions(registry, category, storage)
    if version not in names:
        raise GladError(f"{join(registry, category)} has no version '{version}'{did_you_mean(version, names)}")
    folder = inside(registry, category, version)
    return parse_description(storage.read(join(folder, GLAD_JSON)), folder)


def current(registry: str, category: str, storage: Storage) -> Current | None:
    """The category's current version; None if none was promoted yet.

    Raises:
        GladError: a damaged current.json.
    """
    path = join(inside(registry, category), CURRENT)
    if storage.kind(path) != "file":
        return None
    try:
        return Current.model_validate_json(storage.read(path))
    except ValidationError as error:
        raise GladError(f"{path}: damaged; `glad registry promote {registry} {category} VERSION` writes it") from error


def publish(bundle: Path, registry: str, category: str, storage: Storage) -> str:
    """Add a bundle as a version and return the version; an existing one stays as it is."""
    version = read_description(bundle).model_id
    storage.publish(bundle, inside(registry, category, version), GLAD_JSON)
    return version


def promote(registry: str, category: str, version: str, storage: Storage, reason: str) -> Current:
    """Make a version the current one, in one step for every reader; the former one becomes the newest earlier one.

    Raises:
        GladError: no such version.
    """
    description(registry, category, version, storage)
    before = current(registry, category, storage)
    earlier = [before.version, *before.earlier] if before is not None else []
    earlier = [name for name in earlier if name != version]
    chosen = Current(version=version, since=_now(), reason=reason, earlier=earlier)
    storage.write(join(inside(registry, category), CURRENT), chosen.model_dump_json(indent=1).encode())
    return chosen


def rollback(registry: str, category: str, storage: Storage) -> Current:
    """Make the version before the current one current again.

    Raises:
        GladError: there is no earlier version.
    """
    now = current(registry, category, storage)
    if now is None or not now.earlier:
        raise GladError(f"{join(registry, category)}: no earlier version to go back to")
    version, *earlier = now.earlier
    description(registry, category, version, storage)
    reason = f"rolled back from {now.version}"
    chosen = Current(version=version, since=_now(), reason=reason, earlier=earlier)
    storage.write(join(inside(registry, category), CURRENT), chosen.model_dump_json(indent=1).encode())
    return chosen


def current_bundles(registry: str, storage: Storage) -> dict[str, str]:
    """Location of each category's current bundle.

    Raises:
        GladError: no category has one.
    """
    chosen = {name: current(registry, name, storage) for name in _folders(registry, storage)}
    bundles = {name: inside(registry, name, now.version) for name, now in chosen.items() if now is not None}
    if not bundles:
        raise GladError(f"{registry}: no category has a current version; promote one with `glad registry promote`")
    return bundles


def category_rows(location: str) -> list[dict[str, Any]]:
    """A row per category: its name, current version, since when and why (None if there is none), and all versions.

    Raises:
        GladError: no such registry.
    """
    storage, registry = Storage.from_environment(), absolute(location)
    rows = []
    for name in categories(registry, storage):
        now = current(registry, name, storage)
        rows.append(
            {
                "category": name,
                "current": now.version if now else None,
                "since": now.since if now else None,
                "reason": now.reason if now else None,
                "versions": versions(registry, name, storage),
            }
        )
    return rows


def version_rows(location: str, category: str) -> list[dict[str, Any]]:
    """A row per version of a category: ``state`` (current, earlier or None), number of good images, main settings.

    Raises:
        GladError: no such category.
    """
    storage, registry = Storage.from_environment(), absolute(location)
    names = versions(registry, category, storage)
    if not names:
        near = did_you_mean(category, categories(registry, storage))
        raise GladError(f"{registry} has no category '{category}'{near}")
    now = current(registry, category, storage)
    states = dict.fromkeys(now.earlier, "earlier") | {now.version: "current"} if now else {}
    rows = []
    for name in names:
        bundle = description(registry, category, name, storage)
        settings = {setting: bundle.settings.get(setting) for setting in ("threshold", "start_step", "delta")}
        good_images = bundle.provenance.get("good_images")
        rows.append({"version": name, "state": states.get(name), "good_images": good_images, **settings})
    return rows


def print_categories(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows of `category_rows` as a table."""
    table = Table("category", "current", "since", "versions", "why")
    for row in rows:
        count, reason = str(len(row["versions"])), row["reason"] or "none promoted"
        table.add_row(*map(escape, (row["category"], row["current"] or "-", row["since"] or "-", count, reason)))
    console.print(table)


def print_versions(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows of `version_rows` as a table."""
    table = Table("version", "state", "good images", "threshold", "start_step", "delta")
    for row in rows:
        cells = [
            "-" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))
            for value in row.values()
        ]
        table.add_row(*cells)
    console.print(table)


def inside(registry: str, *names: str) -> str:
    """The location of a category's or a version's folder.

    Raises:
        GladError: a name, or a link there, leads out of the registry.
    """
    for name in names:
        if not re.fullmatch(NAME, name):
            raise GladError(f"{registry}: {name!r} cannot name a category or version; rename it, without / and \\")
    location = join(registry, *names)
    if not is_s3(registry) and not Path(os.path.realpath(location)).is_relative_to(os.path.realpath(registry)):
        raise GladError(f"{location}: is a link that leads out of the registry; copy the bundle there instead")
    return location


def _folders(location: str, storage: Storage) -> list[str]:
    return [name for name in storage.folders(location) if not name.startswith(".")]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
