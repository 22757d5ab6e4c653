"""From what a user calls --model to a bundle folder on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from cluster.storage import Storage, is_s3, join, local_path
from glad_core import bundle
from glad_core.errors import GladError

SMALL = "small"
SMALL_BUNDLE = Path(bundle.__file__).parent / "small_bundle"


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
    manifest = join(model, bundle.MANIFEST)
    if storage.kind(manifest) != "file":
        raise GladError(f"{model}: no model bundle there (no {bundle.MANIFEST}); copy one there whole")
    name = hashlib.sha256(model.encode() + storage.read(manifest)).hexdigest()[:24]
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
