"""The `glad` command. Each subcommand imports what it needs when it runs, so that `glad --help` is quick."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cluster.session import SessionError
from cluster.storage import StorageError
from glad_core.errors import GladError

USER_ERROR = 2  # exit code of a mistake in what was asked
STOPPED = 1  # exit code of a job that --max-errors stopped


class OneLineErrors(TyperGroup):
    """A user's mistake is one line on stderr and exit code 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (GladError, StorageError, SessionError) as error:
            _fail(str(error), USER_ERROR)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find defects in photos with GLAD, adaptive diffusion anomaly detection, on Ray.",
)


class Maps(StrEnum):
    token = "token"
    full = "full"


@app.command()
def score(
    source: Annotated[
        str,
        typer.Argument(help="Folder, glob, MVTec-AD category, URI list (.txt, .parquet) or tar shards; local or s3://"),
    ],
    out: Annotated[str, typer.Option(help="Folder for the results, local or s3://")],
    model: Annotated[str, typer.Option(help="Model bundle, local or s3://; 'small' is the embedded one")] = "small",
    category: Annotated[str | None, typer.Option(help="Category within an MVTec-AD folder")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch; does not change results")] = 8,
    actors: Annotated[int | None, typer.Option(min=1, help="Model copies at work; as many as fit by default")] = None,
    num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs per actor, fractions allowed")] = None,
    num_cpus: Annotated[float | None, typer.Option(min=0.1, help="CPUs per actor")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; with the image id it fixes the result")] = 0,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop with exit code 1 once more images than this have failed")
    ] = None,
    maps: Annotated[Maps, typer.Option(help="Resolution of the stored anomaly maps")] = Maps.token,
    reconstructions: Annotated[bool, typer.Option("--reconstructions", help="Store reconstructions as PNG")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster: host:port or auto; else this machine")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run's results in --out")] = False,
) -> None:
    """Score every image of an archive; unreadable ones are listed in OUT/errors and do not stop the job."""
    from pipelines import score as job

    request = job.ScoreRequest(
        source=source,
        out=out,
        model=model,
        category=category,
        batch_size=batch_size,
        actors=actors,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        seed=seed,
        max_errors=max_errors,
        maps=maps.value,
        reconstructions=reconstructions,
        address=address,
        overwrite=overwrite,
    )
    try:
        job.score(request, Console())
    except job.TooManyErrors as error:
        _fail(str(error), STOPPED)


@app.command()
def show(
    results: Annotated[str, typer.Argument(help="The --out of a `glad score`, local or s3://")],
    top: Annotated[int, typer.Option(min=1, max=200, help="Images to show, highest scores first")] = 20,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("sheet.png"),
) -> None:
    """Draw a contact sheet of a run: input, reconstruction, heat map, score, stop step."""
    from pipelines.show import show as draw

    draw(results, top, out, Console())


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Argument(help="Folder for the MVTec-AD tree")],
    seed: Annotated[int, typer.Option(help="Seed of the pictures")] = 0,
) -> None:
    """Draw the demo category: circuit boards, good ones and four kinds of defect with their masks."""
    from pipelines.demo_data import make_demo_data

    try:
        folder = make_demo_data(out, seed)
    except OSError as error:
        raise GladError(f"{out}: {error.strerror or error}; choose a folder that can be written") from error
    Console().print(f"demo data in {escape(str(folder))}", highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data, the results, the sheet and metrics.json")] = Path(
        "demo-output"
    ),
) -> None:
    """Make demo data, score it with the small model, and show what was found."""
    from pipelines.demo import demo as run

    run(out, Console())


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(help="MVTec-AD tree, or one category's folder with train/good in it")],
    out: Annotated[Path, typer.Option(help="Bundle to write")],
    category: Annotated[str | None, typer.Option(help="Category within the tree")] = None,
    base: Annotated[Path | None, typer.Option(help="Bundle to start from; the embedded small one by default")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the base recommends")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step; the base recommends")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The base recommends")] = None,
    textures: Annotated[Path | None, typer.Option(help="Folder of texture pictures for synthetic anomalies")] = None,
    target_fpr: Annotated[float, typer.Option(min=0.001, max=0.5, help="False-positive rate of the threshold")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps")] = "cpu",
) -> None:
    """Fine-tune a bundle on good images (ATP) and calibrate it; the same command goes on after being killed."""
    from pipelines.model_source import SMALL_BUNDLE
    from pipelines.train import TrainRequest
    from pipelines.train import train as run

    recipe = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    request = TrainRequest(dataset, category, base or SMALL_BUNDLE, out, recipe, textures, device, target_fpr)
    model_id = run(request, Console())
    Console().print(f"bundle {model_id} in {escape(str(out))}", highlight=False)


bundles = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Make and inspect model bundles.")
app.add_typer(bundles, name="bundle")


@bundles.command("create")
def bundle_create(
    diffusion: Annotated[str, typer.Argument(help="Stable Diffusion folder in diffusers format, or hub id")],
    out: Annotated[Path, typer.Option(help="Bundle to write")],
    features: Annotated[str, typer.Option(help="timm name of the ViT")] = "vit_base_patch8_224.dino",
    preset: Annotated[str | None, typer.Option(help="Published settings, DATASET/CATEGORY: MVTec-AD/screw")] = None,
    category: Annotated[str, typer.Option(help="Name of what the model judges")] = "",
) -> None:
    """A bundle from a diffusion model and a timm ViT."""
    from pipelines.bundle import create

    Console().print(create(diffusion, features, out, category=category, preset=preset, settings={}))


@bundles.command("import-unet")
def bundle_import_unet(
    base: Annotated[Path, typer.Argument(help="Bundle to take everything else from")],
    checkpoint: Annotated[Path, typer.Argument(help="The authors' checkpoint-*/pytorch_model.bin")],
    out: Annotated[Path, typer.Option(help="Bundle to write")],
    preset: Annotated[str | None, typer.Option(help="Published settings, DATASET/CATEGORY")] = None,
    category: Annotated[str, typer.Option(help="Name of what the model judges")] = "",
) -> None:
    """A bundle with the UNet of an authors' checkpoint, read without running its pickle."""
    from pipelines.bundle import import_unet

    Console().print(import_unet(base, checkpoint, out, category=category, preset=preset))


@bundles.command("inspect")
def bundle_inspect(path: Annotated[Path, typer.Argument(help="Bundle folder")]) -> None:
    """Print what is inside a bundle and verify every file."""
    from pipelines.bundle import inspect

    inspect(path, Console())


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"[red]Error:[/red] {escape(line)}", highlight=False)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script ``glad``."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
