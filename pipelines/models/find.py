"""From the value of --model to bundles: which one judges which image, and each as a folder on this machine."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.storage import Storage, StorageError, absolute, explain, is_s3, join
from glad_core.bundle import glad_json
from glad_core.bundle.glad_json import SMALL, SMALL_BUNDLE, SMALL_IS
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from pipelines.models import cache, registry

if TYPE_CHECKING:
    from glad_core.detector import Detector

SHOWN = 5  # names of categories in a line
MOST_FILES = 1000  # looked at in a place that should hold the dozen of a bundle
TRAIN = "for other products train one: glad train GOOD --out BUNDLE"


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

    def line(self, model: str) -> str:
        """Which model judges, and what it was trained for, in one line; ``model``: what ``--model`` names."""
        if "" not in self.bundles:
            names = ", ".join((*self.categories[:SHOWN], *(["…"] if len(self.categories) > SHOWN else [])))
            count = len(self.categories)
            return f"models of {count} categor{'y' if count == 1 else 'ies'} in {model}: {names}"
        description = self.descriptions[""]
        line = f"model {model} ({description.model_id})" + (f" for {description.category}" * bool(description.category))
        return f"{line}: {SMALL_IS}; {TRAIN}" if self.bundles[""] == SMALL else line

    def by_nearest(self) -> Models:
        """The same bundles, judging by nearest good patches."""
        return replace(
            self,
            descriptions={
                key: self.descriptions[key].model_copy(
                    update={"settings": settings.judged_by("nearest").model_dump(mode="json")}
                )
                for key, settings in self.settings().items()
            },
        )

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
    description = describe(model, storage)
    categories = tuple(description.category.split(",")) if "," in description.category else ()
    return Models({"": bundle_location(model)}, {"": description}, categories)


def bundle_location(model: str) -> str:
    """What ``--model`` names, in one spelling for every machine: an absolute location, or ``small``, the embedded one.

    A bundle in a folder of that name wins.

    Raises:
        StorageError: an unknown kind of location.
    """
    return SMALL if model == SMALL and not Path(SMALL, glad_json.GLAD_JSON).is_file() else absolute(model)


def describe(model: str, storage: Storage) -> glad_json.Description:
    """A bundle's description, checked against the names and sizes of its files. Of s3:// nothing else is read.

    Raises:
        GladError: no bundle there, or one with other files than it lists. StorageError: S3 cannot be used.
    """
    location = bundle_location(model)
    if not is_s3(location):
        return glad_json.read_description(SMALL_BUNDLE if location == SMALL else location)
    return _checked(location, _read_glad_json(location, storage), storage)


def local_bundle(model: str, storage: Storage) -> Path:
    """The folder of a bundle on this machine: that of ``small``, a local one, or the copy of an s3:// bundle (`cache`).

    The copy is named after the bundle's glad.json, so that a changed bundle is copied anew.

    Raises:
        GladError: no bundle there, or one with files that it does not list. StorageError: S3 or the cache's disk cannot
            be used.
    """
    location = bundle_location(model)
    if not is_s3(location):
        return SMALL_BUNDLE if location == SMALL else Path(location)
    text = _read_glad_json(location, storage)
    return cache.cached(location, text, lambda: _checked(location, text, storage), storage)


def _read_glad_json(location: str, storage: Storage) -> bytes:
    file = join(location, glad_json.GLAD_JSON)
    try:
        return storage.read(file, most=glad_json.MAX_JSON)
    except FileNotFoundError as error:
        raise GladError(
            f"{location}: no model bundle there (no {glad_json.GLAD_JSON}); copy one there whole"
        ) from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise GladError(
                f"{file}: larger than {glad_json.MAX_JSON} bytes, so not of a bundle; copy it again"
            ) from error
        raise StorageError(explain(file, storage.endpoint, error)) from error


def _checked(location: str, text: bytes, storage: Storage) -> glad_json.Description:
    """The description in ``text``, after a look at the names and sizes of the files beside it."""
    description = glad_json.parse_description(text, location)
    glad_json.check_files(description, dict(islice(storage.walk(location), MOST_FILES)), location)
    return description


def pretrained(model: str, category: str | None = None, device: str | None = None, seed: int = 0) -> Detector:
    """`glad_core.Detector.from_pretrained` of whatever ``--model`` may name: also ``s3://``, or a registry's category.

    Raises:
        GladError: as there; also a registry without that category. StorageError: S3 cannot be used.
    """
    from glad_core.detector import Detector  # here: it imports PyTorch

    storage = Storage.from_environment()
    models = find_models(model, storage)
    only = models.categories[0] if "" not in models.bundles and len(models.categories) == 1 else None
    key = models.key(category or only)
    if key is None or key not in models.bundles:
        raise GladError(f"{model}: no model for category '{category}'; there are {', '.join(models.categories)}")
    bundle = models.bundles[key]
    return Detector.from_pretrained(SMALL if bundle == SMALL else local_bundle(bundle, storage), device, seed)
