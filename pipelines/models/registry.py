"""A model registry that is just storage: REGISTRY/<category>/<version>/ bundles and REGISTRY/<category>/current.json.

A version is a bundle's model id, so it never changes once it is there. ``current.json`` names the version that scores,
and those that did before, newest first; it is replaced as a whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import Storage, is_s3, join, local_path
from glad_core.bundle.glad_json import GLAD_JSON, Description, read_description
from glad_core.errors import GladError, did_you_mean

CURRENT = "current.json"


@dataclass(frozen=True)
class Current:
    """Which version scores a category, since when and why, and which did before (newest first)."""

    version: str
    since: str
    reason: str
    earlier: list[str]


def is_registry(location: str, storage: Storage) -> bool:
    """Whether a folder holds categories with a current version (and is no bundle itself)."""
    if storage.kind(join(location, GLAD_JSON)) == "file":
        return False
    return any(storage.kind(join(location, name, CURRENT)) == "file" for name in storage.folders(location))


def categories(registry: str, storage: Storage) -> list[str]:
    """Categories with at least one version.

    Raises:
        GladError: no such registry.
    """
    names = [name for name in storage.folders(registry) if versions(registry, name, storage)]
    if not names:
        raise GladError(f"{registry}: no model registry there; `glad retrain` makes one")
    return names


def versions(registry: str, category: str, storage: Storage) -> list[str]:
    """Complete versions of a category: a bundle's description is its last file to arrive."""
    folder = join(registry, category)
    names = [name for name in storage.folders(folder) if not name.startswith(".")]
    return [name for name in names if storage.kind(join(folder, name, GLAD_JSON)) == "file"]


def description(registry: str, category: str, version: str, storage: Storage) -> Description:
    """``glad.json`` of a version.

    Raises:
        GladError: no such version, or a damaged description.
    """
    known = versions(registry, category, storage)
    if version not in known:
        raise GladError(f"{join(registry, category)} has no version '{version}'{did_you_mean(version, known)}")
    place = join(registry, category, version, GLAD_JSON)
    try:
        return Description.model_validate_json(storage.read(place))
    except ValueError as error:
        raise GladError(f"{place}: damaged; remove this version and train it again") from error


def current(registry: str, category: str, storage: Storage) -> Current | None:
    """The category's current version, None where none was promoted yet.

    Raises:
        GladError: a damaged current.json.
    """
    place = join(registry, category, CURRENT)
    if storage.kind(place) != "file":
        return None
    try:
        return Current(**json.loads(storage.read(place)))
    except (ValueError, TypeError) as error:
        raise GladError(f"{place}: damaged; `glad registry promote {registry} {category} VERSION` writes it") from error


def publish(made: Path, registry: str, category: str, storage: Storage) -> str:
    """Add a bundle as a version; one that is there already stays as it is. Returns the version."""
    version = read_description(made).model_id
    storage.publish(made, join(registry, category, version), GLAD_JSON)
    return version


def promote(registry: str, category: str, version: str, storage: Storage, reason: str) -> Current:
    """Make a version the current one, in one step for every reader; the one before is remembered.

    Raises:
        GladError: no such version.
    """
    description(registry, category, version, storage)
    before = current(registry, category, storage)
    earlier = [before.version, *before.earlier] if before is not None else []
    chosen = Current(version, _now(), reason, [name for name in earlier if name != version])
    storage.write(join(registry, category, CURRENT), json.dumps(asdict(chosen), indent=1).encode())
    return chosen


def rollback(registry: str, category: str, storage: Storage) -> Current:
    """Make the version before the current one current again.

    Raises:
        GladError: there is none.
    """
    now = current(registry, category, storage)
    if now is None or not now.earlier:
        raise GladError(f"{join(registry, category)}: no earlier version to go back to")
    version, *earlier = now.earlier
    description(registry, category, version, storage)
    chosen = Current(version, _now(), f"rolled back from {now.version}", earlier)
    storage.write(join(registry, category, CURRENT), json.dumps(asdict(chosen), indent=1).encode())
    return chosen


def current_bundles(registry: str, storage: Storage) -> dict[str, str]:
    """Where each category's current bundle is.

    Raises:
        GladError: no category has one.
    """
    found = {name: current(registry, name, storage) for name in storage.folders(registry)}
    bundles = {name: join(registry, name, chosen.version) for name, chosen in found.items() if chosen is not None}
    if not bundles:
        raise GladError(f"{registry}: no category has a current version; promote one with `glad registry promote`")
    return bundles


def absolute(registry: str) -> str:
    """A registry's location without a trailing slash, absolute where it is local."""
    return registry.rstrip("/") if is_s3(registry) else local_path(registry)


def listed(location: str) -> list[dict[str, Any]]:
    """Every category with its current version, since when and why (None where none was promoted), and all versions.

    Raises:
        GladError: no such registry.
    """
    storage = Storage.from_environment()
    home = absolute(location)
    rows = []
    for name in categories(home, storage):
        now = current(home, name, storage)
        told: dict[str, str | None] = {"current": None, "since": None, "reason": None}
        if now is not None:
            told = {"current": now.version, "since": now.since, "reason": now.reason}
        rows.append({"category": name, **told, "versions": versions(home, name, storage)})
    return rows


def described(location: str, category: str) -> list[dict[str, Any]]:
    """A category's versions: ``state`` (current, earlier, or None), and what each was trained on and with.

    Raises:
        GladError: no such category.
    """
    storage = Storage.from_environment()
    home = absolute(location)
    known = versions(home, category, storage)
    if not known:
        raise GladError(f"{home} has no category '{category}'{did_you_mean(category, categories(home, storage))}")
    now = current(home, category, storage)
    rows = []
    for version in known:
        facts = description(home, category, version, storage)
        state = "current" if now and version == now.version else ("earlier" if now and version in now.earlier else None)
        values = {name: facts.settings.get(name) for name in ("threshold", "start_step", "delta")}
        rows.append({"version": version, "state": state, "good_images": facts.provenance.get("good_images"), **values})
    return rows


def print_list(rows: list[dict[str, Any]], console: Console) -> None:
    """What `listed` found, as a table."""
    table = Table("category", "current", "since", "versions", "why")
    for row in rows:
        told = (row["current"] or "-", row["since"] or "-", str(len(row["versions"])), row["reason"] or "none promoted")
        table.add_row(row["category"], *map(escape, told))
    console.print(table)


def print_versions(rows: list[dict[str, Any]], console: Console) -> None:
    """What `described` found, as a table."""
    table = Table("version", "state", "good images", "threshold", "T", "δ")
    for row in rows:
        told = [
            "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            for value in row.values()
        ]
        table.add_row(*told)
    console.print(table)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
