"""Bundles with the weights of another one and settings of their own, where every machine can read them."""

from __future__ import annotations

from itertools import islice

from cluster.storage import Storage, is_s3, join
from glad_core.bundle.glad_json import GLAD_JSON, OPTIONAL, REQUIRED, Description, text_of
from glad_core.errors import GladError
from pipelines.models.find import MOST_FILES, SMALL, SMALL_BUNDLE


def check_free(out: str, storage: Storage) -> None:
    """Refuse an absolute location that holds something already.

    A killed command may have left files of a bundle on S3, but no glad.json; they are replaced.

    Raises:
        GladError: something is there.
    """
    if is_s3(out):
        names = {name for name, _ in islice(storage.walk(out), MOST_FILES)}
        free = names <= REQUIRED | OPTIONAL
    else:
        free = storage.kind(out) == "none"
    if not free:
        raise GladError(f"{out} already exists: choose another --out or remove it")


def write_variant(base: str, description: Description, out: str, storage: Storage, linked: bool = False) -> None:
    """Write the bundle with the weights of ``base`` and another description to ``out``: whole or not at all.

    On S3 the server copies; this machine sends or receives weights only if one of the two is local.

    Args:
        base: `bundle_location`.
        linked: on one disk link the weights instead of copying them, for a bundle that is deleted soon.

    Raises:
        GladError: another command has written ``out``. StorageError: storage cannot be used.
    """
    folder = str(SMALL_BUNDLE) if base == SMALL else base
    sources = {name: join(folder, name) for name in description.files}
    if not storage.assemble(out, sources, GLAD_JSON, text_of(description), linked):
        raise GladError(f"{out} already exists: choose another --out or remove it")
