"""Commands about models that exist: registry, bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.cli.options import Json, on_this_machine, print_json

commands = typer.Typer()
registries = typer.Typer(no_args_is_help=True, help="List a model registry and change which versions are in use.")
bundles = typer.Typer(no_args_is_help=True, help="Make and inspect model bundles.")

Registry = Annotated[str, typer.Argument(help="Model registry: the --out of a `glad retrain`, local or s3://")]
RegistryCategory = Annotated[str, typer.Argument(help="Category in the registry")]
Preset = Annotated[str | None, typer.Option(help="Published settings to use, DATASET/CATEGORY: MVTec-AD/screw")]


@registries.command("list", epilog="Example: glad registry list s3://bucket/models")
def registry_list(registry: Registry, as_json: Json = False) -> None:
    """List every category with its current version."""
    from pipelines.models.registry import category_rows, print_categories

    rows = category_rows(registry)
    if as_json:
        print_json({"categories": rows})
    else:
        print_categories(rows, Console())


@registries.command("show", epilog="Example: glad registry show models screw")
def registry_show(registry: Registry, category: RegistryCategory, as_json: Json = False) -> None:
    """List the versions of a category."""
    from pipelines.models.registry import print_versions, version_rows

    rows = version_rows(registry, category)
    if as_json:
        print_json({"versions": rows})
    else:
        print_versions(rows, Console())


@registries.command("promote", epilog="Example: glad registry promote models screw 0123456789abcdef")
def registry_promote(
    registry: Registry,
    category: RegistryCategory,
    version: Annotated[str, typer.Argument(help="Version to put in use")],
) -> None:
    """Make a version of a category the current one."""
    from cluster.storage import Storage, absolute
    from pipelines.models.registry import promote

    promote(absolute(registry), category, version, Storage.from_environment(), "by hand")
    Console().print(f"{category}: {version} is current", highlight=False)


@registries.command("rollback", epilog="Example: glad registry rollback models screw")
def registry_rollback(registry: Registry, category: RegistryCategory) -> None:
    """Go back to the version that was current before."""
    from cluster.storage import Storage, absolute
    from pipelines.models.registry import rollback

    current = rollback(absolute(registry), category, Storage.from_environment())
    Console().print(f"{category}: {current.version} is current again", highlight=False)


@bundles.command(
    "create", epilog="Example: glad bundle create stable-diffusion-v1-4/ --out bundle --preset MVTec-AD/screw"
)
def bundle_create(
    diffusion: Annotated[str, typer.Argument(help="Stable Diffusion: a folder in diffusers format, or a hub id")],
    out: Annotated[Path, typer.Option(help="Bundle to write", callback=on_this_machine)],
    features: Annotated[
        str,
        typer.Option(
            help="Network that compares images: its name in timm; of a CNN also the strides compared, NAME:8,16"
        ),
    ] = "vit_base_patch8_224.dino",
    preset: Preset = None,
    category: Annotated[str, typer.Option(help="What the model judges; a,b,c: one model for several")] = "",
) -> None:
    """Make a bundle from Stable Diffusion and a network that compares images."""
    from pipelines.models.make import create

    console = Console(stderr=True)
    made = create(diffusion, features, out, category=category, preset=preset, settings={}, console=console)
    Console().print(made)


@bundles.command(
    "import-unet", epilog="Example: glad bundle import-unet bundle checkpoint-8000/pytorch_model.bin --out screw"
)
def bundle_import_unet(
    base: Annotated[Path, typer.Argument(help="Bundle to take everything else from", callback=on_this_machine)],
    checkpoint: Annotated[
        Path, typer.Argument(help="The authors' checkpoint-*/pytorch_model.bin", callback=on_this_machine)
    ],
    out: Annotated[Path, typer.Option(help="Bundle to write", callback=on_this_machine)],
    preset: Preset = None,
    category: Annotated[str, typer.Option(help="What the model judges")] = "",
) -> None:
    """Make a bundle with the denoising network of an authors' checkpoint. No code in the checkpoint is run."""
    from pipelines.models.make import import_unet

    Console().print(import_unet(base, checkpoint, out, category=category, preset=preset))


@bundles.command("inspect", epilog="Example: glad bundle inspect bundle")
def bundle_inspect(
    path: Annotated[str, typer.Argument(help="Bundle, local or s3://; 'small' is the built-in one")],
    as_json: Json = False,
) -> None:
    """Print what is in a bundle and verify every file."""
    from cluster.storage import Storage
    from glad_core.bundle.glad_json import read_json
    from pipelines.models.find import local_bundle
    from pipelines.models.make import inspect

    folder = local_bundle(path, Storage.from_environment())
    description = inspect(folder, Console(stderr=as_json))
    if as_json:
        features = read_json(folder / "features/config.json")
        print_json(description.model_dump() | {"features": features})


commands.add_typer(registries, name="registry")
commands.add_typer(bundles, name="bundle")
