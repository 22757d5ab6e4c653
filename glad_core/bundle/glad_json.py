"""``glad.json``, the description of a bundle: read, checked and written without loading a tensor or PyTorch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from glad_core.bundle.good_scores import KeptScores
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError, one_line

SCHEMA_VERSION = 1
GLAD_JSON = "glad.json"
# The bundle in this package, and what it is for.
SMALL, SMALL_BUNDLE = "small", Path(__file__).parents[1] / "small_bundle"
SMALL_IS = "the demo's, trained on drawn circuit boards"
REQUIRED = frozenset(
    {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "features/config.json",
        "features/model.safetensors",
        "prompt.safetensors",
    }
)
FINAL_FEATURES = frozenset({"final_features/config.json", "final_features/model.safetensors"})  # both or neither
MEMORY = "memory.safetensors"  # good patches, of a bundle whose method is `nearest`
OPTIONAL = FINAL_FEATURES | {MEMORY}
OF_SETTINGS = ("good_scores", "threshold_doubt")  # provenance that does not outlive them
MAX_JSON = 2**20  # bytes; ours have a few thousand

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class FileEntry(BaseModel):
    """Size in bytes and sha256 of one file."""

    size: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Provenance(TypedDict, total=False):
    """Where a bundle comes from: free-form, apart from what later commands read.

    ``good_scores`` are those of the good pictures behind the threshold, by category if each has its own, else under "";
    ``threshold_doubt`` is a line on why that may be too low.
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    recipe: dict[str, Any]
    target_fpr: Share
    confidence: Share
    calibration_images: Count
    good_images: Count
    held_out_images: Count
    good_scores: dict[str, KeptScores]
    threshold_doubt: str


class Description(BaseModel):
    """The content of ``glad.json``.

    ``model_id`` is a hash of the settings, the category, the good pictures' scores and all file hashes: bundles with
    the same verdicts share it.
    ``settings`` are the values of `Settings`, ``provenance`` is free-form, ``versions`` those of the packages that
    wrote the bundle, ``files`` every other file by its path in the bundle.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: int
    model_id: str = Field(pattern="^[0-9a-f]{16}$")  # also the name of a folder in a registry
    category: str = Field(pattern=r"^[^\x00-\x1f\x7f]*$")
    settings: dict[str, Any]
    provenance: Provenance
    versions: dict[str, str]
    files: dict[str, FileEntry]


def read_description(path: str | Path) -> Description:
    """Read ``glad.json``, and check it and the presence and size of every file.

    Raises:
        GladError: not a bundle, of another schema version, incomplete, or with files that no bundle has.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            raise GladError(f"{path}: no such model bundle folder; make one with `glad bundle create` or `glad train`")
        if not (path / GLAD_JSON).is_file():
            hint = " (a diffusers folder: turn it into a bundle with `glad bundle create`)" * _is_diffusers(path)
            raise GladError(f"{path}: not a GLAD bundle, it has no {GLAD_JSON}{hint}")
        description = parse_description(_read_small(path / GLAD_JSON), str(path))
        check_files(description, _sizes(path), str(path))
    except OSError as error:
        raise GladError(f"{path}: cannot be read ({error.strerror or error}); correct the rights or copy it") from error
    return description


def parse_description(text: bytes, where: str) -> Description:
    """``glad.json`` of the bundle at ``where`` from its bytes, settings and names of files checked.

    Raises:
        GladError: damaged, of another schema version, or a name that no bundle has.
    """
    try:
        description = Description.model_validate_json(text)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        wrong = f" ({key!r} is missing or wrong)" if key else ""
        raise GladError(
            f"{where}/{GLAD_JSON}: damaged or of another program{wrong}; restore the bundle from its source"
        ) from error
    if description.schema_version != SCHEMA_VERSION:
        raise GladError(
            f"{where}: bundle schema version {description.schema_version}, this program reads {SCHEMA_VERSION}: "
            "use the matching glad version or make the bundle again"
        )
    names = set(description.files)
    # Only these names, so that none can lead out of the folder.
    for name in sorted(names - REQUIRED - OPTIONAL):
        raise GladError(f"{where}: {GLAD_JSON} lists {name!r}, which is no file of a bundle; make the bundle again")
    for name in sorted(REQUIRED - names) + sorted(FINAL_FEATURES - names if FINAL_FEATURES & names else ()):
        raise GladError(f"{where}: incomplete bundle, {GLAD_JSON} does not list {name}; make the bundle again")
    Settings.parse(description.settings, f"{where}/{GLAD_JSON}")
    return description


def check_files(description: Description, sizes: Mapping[str, int], where: str) -> None:
    """Compare the files of the bundle at ``where``, by their size in bytes, with its description.

    Raises:
        GladError: one is missing, unknown, or of another size.
    """
    present = sizes.keys() - {GLAD_JSON}
    for name in sorted(present - description.files.keys()):
        raise GladError(f"{where}: {name!r} is not listed in {GLAD_JSON}; remove it or make the bundle again")
    for name in sorted(description.files.keys() - present):
        raise GladError(f"{where}: incomplete bundle, {name} is missing; copy the bundle again")
    for name, entry in sorted(description.files.items()):
        if sizes[name] != entry.size:
            raise GladError(
                f"{where}: damaged bundle, {name} has {sizes[name]} bytes instead of {entry.size}; copy it again"
            )


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of every file in a bundle's folder, by its path there.

    Raises:
        GladError: one is a link, which could lead anywhere.
    """
    sizes = {}
    for file in path.rglob("*"):
        name = str(file.relative_to(path))
        if file.is_symlink():
            raise GladError(f"{path}: {name!r} is a link, a bundle holds plain files; copy it with `cp -rL`")
        if file.is_file():
            sizes[name] = file.stat().st_size
    return sizes


def _read_small(file: Path) -> bytes:
    with file.open("rb") as stream:
        text = stream.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise GladError(f"{file}: larger than {MAX_JSON} bytes, so not of a bundle; copy the bundle again")
    return text


def read_json(file: Path) -> dict[str, Any]:
    """The object in a small JSON file of a bundle.

    Raises:
        GladError: it cannot be read, or holds something else.
    """
    try:
        values = from_json(_read_small(file), allow_inf_nan=False)
    except (ValueError, OSError) as error:
        raise GladError(f"{file}: damaged ({one_line(error)}); copy the bundle again") from error
    if not isinstance(values, dict):
        raise GladError(f"{file}: damaged (not a JSON object); copy the bundle again")
    return values


def verify(path: str | Path) -> Description:
    """`read_description` that also checks the sha256 of every file and the model id.

    Raises:
        GladError: as `read_description`, or a file or ``glad.json`` was changed.
    """
    path = Path(path)
    description = read_description(path)
    for name, entry in sorted(description.files.items()):
        try:
            digest = _sha256(path / name)
        except OSError as error:
            raise GladError(
                f"{path / name}: cannot be read ({error.strerror}); correct the rights or copy it"
            ) from error
        if digest != entry.sha256:
            raise GladError(f"{path}: damaged bundle, {name} does not match its sha256; copy the bundle again")
    if _model_id(description.settings, description.category, description.provenance, description.files) != (
        description.model_id
    ):
        raise GladError(
            f"{path}: {GLAD_JSON} was changed by hand, its model id no longer fits; use `glad` to change it"
        )
    return description


def update_settings(path: str | Path, settings: Settings, provenance: dict[str, Any]) -> str:
    """Give a bundle new settings, and more provenance; the weights stay. Returns the new model id."""
    description = with_settings(read_description(path), settings, provenance)
    _write(Path(path), description)
    return description.model_id


def with_settings(description: Description, settings: Settings, provenance: dict[str, Any]) -> Description:
    """The description of the same weights with new settings, and more provenance.

    Good pictures' scores, and doubt about a threshold from them, are only kept if ``provenance`` gives them: with other
    settings they would be others.
    """
    earlier = {name: fact for name, fact in description.provenance.items() if name not in OF_SETTINGS}
    merged = {**earlier, **provenance}
    return _describe(settings.model_dump(mode="json"), description.category, merged, description.files)


def write_description(path: Path, settings: dict[str, Any], category: str, provenance: dict[str, Any]) -> Description:
    """Write ``glad.json`` for the files that are in a bundle's folder now, and return it."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != GLAD_JSON)
    files = {name: FileEntry(size=(path / name).stat().st_size, sha256=_sha256(path / name)) for name in names}
    description = _describe(settings, category, provenance, files)
    _write(path, description)
    return description


def _describe(
    settings: dict[str, Any], category: str, provenance: dict[str, Any], files: dict[str, FileEntry]
) -> Description:
    return Description(
        schema_version=SCHEMA_VERSION,
        model_id=_model_id(settings, category, provenance, files),
        category=category,
        settings=settings,
        provenance=Provenance(**provenance),  # type: ignore[typeddict-item]
        versions=versions("glad-ray", "torch", "diffusers", "timm"),
        files=files,
    )


def text_of(description: Description) -> bytes:
    """The content of ``glad.json``."""
    return (description.model_dump_json(indent=1) + "\n").encode()


def _write(path: Path, description: Description) -> None:
    partial = path / f".{GLAD_JSON}.new"
    partial.write_bytes(text_of(description))
    partial.rename(path / GLAD_JSON)  # atomic: a reader sees the old or the new one


def _model_id(
    settings: dict[str, Any], category: str, provenance: Mapping[str, Any], files: dict[str, FileEntry]
) -> str:
    content: dict[str, Any] = {
        "settings": settings,
        "category": category,
        "files": {name: entry.sha256 for name, entry in sorted(files.items())},
    }
    if "good_scores" in provenance:  # older bundles have none
        content["good_scores"] = provenance["good_scores"]
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
