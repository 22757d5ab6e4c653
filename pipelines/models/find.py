"""From what a user calls --model to bundles: which one judges which image, and each as a folder on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import Storage, is_s3, join, local_path
from glad_core.bundle import glad_json
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.models import registry

SMALL = "small"
SMALL_BUNDLE = Path(glad_json.__file__).parents[1] / "small_bundle"


@dataclass(frozen=True)
class Models:
    """Which bundle judges which category. A single bundle has the key "" and judges all; a registry has one for each.

    ``categories`` are those the models know, empty where one bundle judges whatever comes.
    """

    bundles: dict[str, str]
    descriptions: dict[str, glad_json.Description]
    categories: tuple[str, ...]

    def key(self, category: str | None) -> str | None:
        """The bundle for an image of this category; None where there is none."""
        if self.categories and category not in self.categories:
            return None
        return "" if "" in self.bundles else category

    def settings(self) -> dict[str, Settings]:
        """The settings of every bundle, by its key."""
        return {key: Settings.parse(description.settings, key) for key, description in self.descriptions.items()}


def find_models(model: str, storage: Storage) -> Models:
    """The bundle, or the current bundles of the registry, that ``--model`` names.

    Raises:
        GladError: neither. StorageError: S3 cannot be used.
    """
    if model != SMALL and registry.is_registry(registry.absolute(model), storage):
        bundles = registry.current_bundles(registry.absolute(model), storage)
        descriptions = {
            name: registry.description(registry.absolute(model), name, place.rpartition("/")[2], storage)
            for name, place in bundles.items()
        }
        return Models(bundles, descriptions, tuple(sorted(bundles)))
    path = local_bundle(model, storage)
    description = glad_json.read_description(path)
    known = tuple(description.category.split(",")) if "," in description.category else ()
    return Models({"": model if is_s3(model) or model == SMALL else str(path)}, {"": description}, known)


def local_bundle(model: str, storage: Storage) -> Path:
    """The folder of a bundle: ``small`` is the embedded one, an s3:// bundle is fetched once per machine.

    The copy is kept under ``GLAD_CACHE`` (``~/.cache/glad``), named after the bundle's glad.json, so a changed bundle
    is fetched anew. Several processes may ask at once: the first complete copy wins.

    Raises:
        GladError: no bundle there. StorageError: S3 cannot be used.
    """
    if model == SMALL and not Path(SMALL).exists():
        return SMALL_BUNDLE
    if not is_s3(model):
        return Path(local_path(model))
    description = join(model, glad_json.GLAD_JSON)
    if storage.kind(description) != "file":
        raise GladError(f"{model}: no model bundle there (no {glad_json.GLAD_JSON}); copy one there whole")
    name = hashlib.sha256(model.encode() + storage.read(description)).hexdigest()[:24]
    cache = Path(os.environ.get("GLAD_CACHE", "~/.cache/glad")).expanduser() / "bundles"
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        for path, _ in storage.walk(model):
            file = partial / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(storage.read(join(model, path)))
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
