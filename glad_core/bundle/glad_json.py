"""``glad.json``, the description of a bundle: read, checked and written without loading a tensor or PyTorch."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from glad_core.bundle.settings import Settings
from glad_core.errors import GladError

SCHEMA_VERSION = 1
GLAD_JSON = "glad.json"
REQUIRED = (
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "features/config.json",
    "features/model.safetensors",
    "prompt.safetensors",
)


class FileEntry(BaseModel):
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


class Description(BaseModel):
    """The content of ``glad.json``.

    ``model_id`` is a hash of the settings, the category and all file hashes: bundles with the same verdicts share it.
    ``settings`` are the values of `Settings`, ``provenance`` is free-form, ``versions`` those of the packages that
    wrote the bundle, ``files`` every other file by its path in the bundle.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    model_id: str
    category: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileEntry]


def read_description(path: str | Path) -> Description:
    """Read ``glad.json``, and check it and the presence and size of every file.

    Raises:
        GladError: not a bundle, of another schema version, or incomplete.
    """
    path = Path(path)
    if not path.is_dir():
        raise GladError(f"{path}: no such model bundle folder; make one with `glad bundle create` or `glad train`")
    if not (path / GLAD_JSON).is_file():
        hint = " (a diffusers folder: turn it into a bundle with `glad bundle create`)" if _is_diffusers(path) else ""
        raise GladError(f"{path}: not a GLAD bundle, it has no {GLAD_JSON}{hint}")
    try:
        description = Description.model_validate_json((path / GLAD_JSON).read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else ""
        wrong = f" ('{key}' is missing or wrong)" if key else ""
        raise GladError(
            f"{path / GLAD_JSON}: damaged or of another program{wrong}; restore the bundle from its source"
        ) from error
    if description.schema_version != SCHEMA_VERSION:
        raise GladError(
            f"{path}: bundle schema version {description.schema_version}, this program reads {SCHEMA_VERSION}: "
            "use the matching glad version or make the bundle again"
        )
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {GLAD_JSON}
    required = {name for name in REQUIRED if name not in description.files}
    for name in sorted((set(description.files) | required) - present):
        raise GladError(f"{path}: incomplete bundle, {name} is missing; copy the bundle again")
    for name in sorted(required):
        raise GladError(f"{path}: incomplete bundle, {GLAD_JSON} does not list {name}; make the bundle again")
    for name in sorted(present - set(description.files)):
        raise GladError(f"{path}: {name} is not listed in {GLAD_JSON}; remove it or make the bundle again")
    for name, entry in sorted(description.files.items()):
        size = (path / name).stat().st_size
        if size != entry.size:
            raise GladError(f"{path}: damaged bundle, {name} has {size} bytes instead of {entry.size}; copy it again")
    Settings.parse(description.settings, str(path / GLAD_JSON))
    return description


def verify(path: str | Path) -> Description:
    """`read_description` that also checks the sha256 of every file and the model id.

    Raises:
        GladError: as `read_description`, or a file or ``glad.json`` was changed.
    """
    path = Path(path)
    description = read_description(path)
    for name, entry in sorted(description.files.items()):
        if _sha256(path / name) != entry.sha256:
            raise GladError(f"{path}: damaged bundle, {name} does not match its sha256; copy the bundle again")
    if _model_id(description.settings, description.category, description.files) != description.model_id:
        raise GladError(
            f"{path}: {GLAD_JSON} was changed by hand, its model id no longer fits; use `glad` to change it"
        )
    return description


def update_settings(path: str | Path, settings: Settings, provenance: dict[str, Any]) -> str:
    """Give a bundle new settings, and more provenance; the weights stay. Returns the new model id."""
    description = read_description(path)
    provenance = description.provenance | provenance
    return write_description(Path(path), settings.model_dump(), description.category, provenance).model_id


def write_description(path: Path, settings: dict[str, Any], category: str, provenance: dict[str, Any]) -> Description:
    """Write ``glad.json`` for the files that are in a bundle's folder now, and return it."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != GLAD_JSON)
    files = {name: FileEntry(size=(path / name).stat().st_size, sha256=_sha256(path / name)) for name in names}
    description = Description(
        schema_version=SCHEMA_VERSION,
        model_id=_model_id(settings, category, files),
        category=category,
        settings=settings,
        provenance=provenance,
        versions=versions("glad-ray", "torch", "diffusers", "timm"),
        files=files,
    )
    partial = path / f".{GLAD_JSON}.new"
    partial.write_text(description.model_dump_json(indent=1) + "\n")
    partial.rename(path / GLAD_JSON)  # atomic: a reader sees the old or the new one
    return description


def _model_id(settings: dict[str, Any], category: str, files: dict[str, FileEntry]) -> str:
    content = {
        "settings": settings,
        "category": category,
        "files": {name: entry.sha256 for name, entry in sorted(files.items())},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_diffusers(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages; "unknown" for a package that runs from a folder of source."""
    known = {}
    for package in packages:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "unknown"
    return known
