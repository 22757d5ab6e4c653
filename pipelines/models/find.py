"""From the value of --model to bundles: which one judges which image, and each as a folder on this machine."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cluster.storage import Storage, absolute, is_s3, join
from glad_core.bundle import glad_json
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.models import registry

SMALL = "small"
MOST_FILES = 1000  # looked at in a place that should hold the dozen of a bundle
SMALL_BUNDLE = Path(glad_json.__file__).parents[1] / "small_bundle"


@dataclass(frozen=True)
class Models:
    """The bundles of a run, by category.

    Attributes:
        bundles: location of the bundle for each category; a single bundle has the key "".
        descriptions: their glad.json, with the same keys.
        categories: those the models know; empty if one bundle judges every image.
    """

    bundles: dict[str, str]
    descriptions: dict[str, glad_json.Description]
    categories: tuple[str, ...]

    def key(self, category: str | None) -> str | None:
        """Key of the bundle for an image of this category; None if there is none."""
        if self.categories and category not in self.categories:
            return None
        return "" if "" in self.bundles else category

    def settings(self) -> dict[str, Settings]:
        """The settings of every bundle, by its key."""
        return {key: Settings.parse(description.settings, key) for key, description in self.descriptions.items()}


def find_models(model: str, storage: Storage) -> Models:
    """The bundle, or the current bundles of the registry, that ``--model`` names.

    Raises:
        GladError: neither a bundle nor a registry. StorageError: S3 cannot be used.
    """
    if model != SMALL and registry.is_registry(home := absolute(model), storage):
        bundles = registry.current_bundles(home, storage)
        descriptions = {
            name: registry.description(home, name, bundle.rpartition("/")[2], storage)
            for name, bundle in bundles.items()
        }
        return Models(bundles, descriptions, tuple(sorted(bundles)))
    path = local_bundle(model, storage)
    description = glad_json.read_description(path)
    categories = tuple(description.category.split(",")) if "," in description.category else ()
    return Models({"": model if is_s3(model) or model == SMALL else str(path)}, {"": description}, categories)


def local_bundle(model: str, storage: Storage) -> Path:
    """The folder of a bundle: ``small`` is the embedded one; an s3:// bundle is copied once per machine.

    The copy is kept under ``GLAD_CACHE`` (``~/.cache/glad``), named after the bundle's glad.json, so that a changed
    bundle is copied anew. Only what glad.json lists is there to be copied, so nothing lands outside of the copy.

    Raises:
        GladError: no bundle there, or one with files that it does not list. StorageError: S3 or the cache's disk cannot
            be used.
    """
    if model == SMALL and not Path(SMALL).exists():
        return SMALL_BUNDLE
    location = absolute(model)
    if not is_s3(location):
        return Path(location)
    description = join(location, glad_json.GLAD_JSON)
    if storage.kind(description) != "file":
        raise GladError(f"{model}: no model bundle there (no {glad_json.GLAD_JSON}); copy one there whole")
    text = storage.read(description)
    name = hashlib.sha256(location.encode() + text).hexdigest()[:24]
    folder = Path(os.environ.get("GLAD_CACHE", "~/.cache/glad")).expanduser() / "bundles" / name
    if not folder.is_dir():
        listed = dict(islice(storage.walk(location), MOST_FILES))
        glad_json.check_files(glad_json.parse_description(text, location), listed, location)
        storage.fetch(location, folder)
    return folder
