"""Commands that make models: train, retrain, registry, bundle. `pipelines.cli.main` adds them to `glad`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

STOPPED = 1  # exit code of a job that ran and did not come out well

Part = StrEnum("Part", ["unet", "dino", "vae"])
Precision = StrEnum("Precision", ["off", "bf16", "fp16"])
Optimizer = StrEnum("Optimizer", ["adamw", "adamw8bit", "muon"])
Device = StrEnum("Device", ["cpu", "cuda", "mps"])
Promote = StrEnum("Promote", ["always", "gate", "never"])

# What several commands ask for in the same words.
Json = Annotated[bool, typer.Option("--json", help="The result as one line of JSON; words go to stderr")]
Address = Annotated[str | None, typer.Option(help="Ray cluster: host:port or auto; else this machine")]
Base = Annotated[str, typer.Option(help="Bundle to start from; 'small' is the embedded one")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the base recommends")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images per step; the base recommends")]
LearningRate = Annotated[float | None, typer.Option(min=0, help="The base recommends")]
Textures = Annotated[str | None, typer.Option(help="Folder of texture pictures for synthetic anomalies")]
TargetFpr = Annotated[float, typer.Option(min=0.001, max=0.5, help="False-positive rate of the threshold")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random")]
DeviceChoice = Annotated[Device | None, typer.Option(help="cuda where there is a GPU, else cpu")]


def train(
    dataset: Annotated[str, typer.Argument(help="MVTec-AD tree, or one category's folder with train/good in it")],
    out: Annotated[str, typer.Option(help="Bundle to write, local or s3://")],
    category: Annotated[
        str | None, typer.Option(help="Category within the tree; a,b,c or all: one model for several")
    ] = None,
    base: Base = "small",
    part: Annotated[Part, typer.Option(help="What to train: the UNet (ATP), or adapt the DINO or the VAE")] = Part.unet,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per pass and worker; gradients accumulate to --batch-size")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the matrix products; the base recommends")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, a third more time")
    ] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="adamw8bit needs bitsandbytes and a GPU")] = None,
    ema: Annotated[float | None, typer.Option(min=0, max=1, help="Decay of averaged weights; the base says")] = None,
    textures: Textures = None,
    exclude: Annotated[
        str | None, typer.Option(help="Run over the good images: leave out those confirmed as anomalous in `glad view`")
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Run: its false alarms, marked in `glad view`, are good images as well")
    ] = None,
    anomalies: Annotated[
        bool, typer.Option("--anomalies/--no-anomalies", help="Without: a plain diffusion model, for comparison")
    ] = True,
    target_fpr: TargetFpr = 0.05,
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes training together, one GPU each")] = 1,
    device: DeviceChoice = None,
    address: Address = None,
) -> None:
    """Fine-tune a bundle on good images (ATP) and calibrate it; the same command goes on after being killed."""
    from pipelines.train.job import TrainRequest
    from pipelines.train.job import train as run

    recipe = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "micro_batch": micro_batch,
        "autocast": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "optimizer": optimizer,
        "ema_decay": ema,
        "anomaly_probability": None if anomalies else 0.0,
        "seed": seed,
    }
    request = TrainRequest(
        dataset=dataset,
        category=category,
        base=base,
        out=out,
        recipe=recipe,
        part=part.value,  # type: ignore[arg-type]
        textures=textures,
        device=device,
        workers=workers,
        target_fpr=target_fpr,
        address=address,
        exclude=exclude,
        include=include,
    )
    model_id = run(request, Console())
    Console().print(f"bundle {model_id} in {escape(out)}", highlight=False)


def retrain(
    dataset: Annotated[str, typer.Argument(help="MVTec-AD tree, local or s3://")],
    out: Annotated[str, typer.Option(help="Model registry: a folder, local or s3://")],
    categories: Annotated[str, typer.Option(help="all, or a,b,c")] = "all",
    base: Base = "small",
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    textures: Textures = None,
    target_fpr: TargetFpr = 0.05,
    promote: Annotated[
        Promote, typer.Option(help="gate: only a version that detects no worse goes live")
    ] = Promote.gate,
    margin: Annotated[float, typer.Option(min=0, max=1, help="AUROC that the gate lets a version lose")] = 0.02,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="Categories at a time; as many as fit")] = None,
    workers_per_category: Annotated[int, typer.Option(min=1, help="Processes training one category")] = 1,
    seed: Seed = 0,
    device: DeviceChoice = None,
    address: Address = None,
) -> None:
    """Retrain categories side by side into a registry; again, it does what is missing. Exit code 1 if any failed."""
    from pipelines.train import retrain as job
    from pipelines.train.job import TrainRequest

    recipe = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    request = TrainRequest(
        dataset=dataset,
        category=categories,
        base=base,
        out=out,
        recipe=recipe,
        textures=textures,
        device=device,
        workers=workers_per_category,
        target_fpr=target_fpr,
        address=address,
    )
    if not job.retrain(job.RetrainRequest(request, max_parallel, promote.value, margin), Console()):  # type: ignore[arg-type]
        raise typer.Exit(STOPPED)


registries = typer.Typer(no_args_is_help=True, help="Look at a model registry and switch versions.")
Registry = Annotated[str, typer.Argument(help="The --out of a `glad retrain`, local or s3://")]
Category = Annotated[str, typer.Argument(help="Category in the registry")]


@registries.command("list", epilog="Example: glad registry list s3://bucket/models")
def registry_list(registry: Registry, as_json: Json = False) -> None:
    """Every category's current version."""
    from pipelines.models import registry as models

    rows = models.category_rows(registry)
    if as_json:
        print_json({"categories": rows})
    else:
        models.print_categories(rows, Console())


@registries.command("show", epilog="Example: glad registry show models screw")
def registry_show(registry: Registry, category: Category, as_json: Json = False) -> None:
    """A category's versions."""
    from pipelines.models import registry as models

    rows = models.version_rows(registry, category)
    if as_json:
        print_json({"versions": rows})
    else:
        models.print_versions(rows, Console())


@registries.command("promote", epilog="Example: glad registry promote models screw 0123456789abcdef")
def registry_promote(
    registry: Registry, category: Category, version: Annotated[str, typer.Argument(help="Version to score with")]
) -> None:
    """Make a version the current one."""
    from cluster.storage import Storage, absolute
    from pipelines.models import registry as models

    models.promote(absolute(registry), category, version, Storage.from_environment(), "by hand")
    Console().print(f"{category}: {version} is current", highlight=False)


@registries.command("rollback", epilog="Example: glad registry rollback models screw")
def registry_rollback(registry: Registry, category: Category) -> None:
    """Make the version before the current one current again."""
    from cluster.storage import Storage, absolute
    from pipelines.models import registry as models

    chosen = models.rollback(absolute(registry), category, Storage.from_environment())
    Console().print(f"{category}: {chosen.version} is current again", highlight=False)


bundles = typer.Typer(no_args_is_help=True, help="Make and inspect model bundles.")


@bundles.command(
    "create", epilog="Example: glad bundle create stable-diffusion-v1-4/ --out bundle --preset MVTec-AD/screw"
)
def bundle_create(
    diffusion: Annotated[str, typer.Argument(help="Stable Diffusion folder in diffusers format, or hub id")],
    out: Annotated[Path, typer.Option(help="Bundle to write")],
    features: Annotated[str, typer.Option(help="timm name of the ViT")] = "vit_base_patch8_224.dino",
    preset: Annotated[str | None, typer.Option(help="Published settings, DATASET/CATEGORY: MVTec-AD/screw")] = None,
    category: Annotated[str, typer.Option(help="What the model judges; a,b,c: one model for several")] = "",
) -> None:
    """A bundle from a diffusion model and a timm ViT."""
    from pipelines.models.make import create

    Console().print(create(diffusion, features, out, category=category, preset=preset, settings={}))


@bundles.command(
    "import-unet", epilog="Example: glad bundle import-unet bundle checkpoint-8000/pytorch_model.bin --out screw"
)
def bundle_import_unet(
    base: Annotated[Path, typer.Argument(help="Bundle to take everything else from")],
    checkpoint: Annotated[Path, typer.Argument(help="The authors' checkpoint-*/pytorch_model.bin")],
    out: Annotated[Path, typer.Option(help="Bundle to write")],
    preset: Annotated[str | None, typer.Option(help="Published settings, DATASET/CATEGORY")] = None,
    category: Annotated[str, typer.Option(help="Name of what the model judges")] = "",
) -> None:
    """A bundle with the UNet of an authors' checkpoint, read without running its pickle."""
    from pipelines.models.make import import_unet

    Console().print(import_unet(base, checkpoint, out, category=category, preset=preset))


@bundles.command("inspect", epilog="Example: glad bundle inspect bundle")
def bundle_inspect(
    path: Annotated[str, typer.Argument(help="Bundle, local or s3://; 'small' is the embedded one")],
    as_json: Json = False,
) -> None:
    """Print what is inside a bundle and verify every file."""
    from cluster.storage import Storage
    from pipelines.models.find import local_bundle
    from pipelines.models.make import inspect

    description = inspect(local_bundle(path, Storage.from_environment()), Console(stderr=as_json))
    if as_json:
        print_json(description.model_dump())


def print_json(result: dict[str, Any]) -> None:
    """One line on stdout; what is not a number (NaN, JSON knows none) becomes null."""
    plain = json.loads(json.dumps(result), parse_constant=lambda name: None)
    print(json.dumps(plain, ensure_ascii=False))


def add_to(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command(epilog="Example: glad train mvtec --category screw --out bundle")(train)
    app.command(epilog="Example: glad retrain mvtec --out s3://bucket/models --promote gate")(retrain)
    app.add_typer(registries, name="registry")
    app.add_typer(bundles, name="bundle")
