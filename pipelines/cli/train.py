"""Commands that make models from good images: train, retrain, calibrate."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from glad_core.bundle.settings import Profile
from glad_core.errors import GladError
from pipelines.cli import category_file
from pipelines.cli.errors import STOPPED
from pipelines.cli.options import (
    Address,
    Anomalies,
    Base,
    BatchSize,
    DeviceChoice,
    Ema,
    Exclude,
    GradientCheckpointing,
    Include,
    LearningRate,
    MicroBatch,
    OptimizerChoice,
    Overlap,
    PartChoice,
    PrecisionChoice,
    Promote,
    Scale,
    Seed,
    Steps,
    TargetFpr,
    Textures,
    Views,
)
from pipelines.cli.stopping import says_if_stopped

commands = typer.Typer()


@commands.command(epilog="Example: glad train mvtec --category screw --out bundle")
def train(
    ctx: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(help="Folder of good pictures; or a dataset (MVTec-AD, VisA), or one category's folder of it"),
    ],
    out: Annotated[str, typer.Option(help="Bundle to write, local or s3://")],
    category: Annotated[
        str | None,
        typer.Option(
            help="Category within the dataset; a,b,c or all: one model for several. Of good pictures: their name"
        ),
    ] = None,
    base: Base = "small",
    part: PartChoice = "unet",
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    micro_batch: MicroBatch = None,
    precision: PrecisionChoice = None,
    gradient_checkpointing: GradientCheckpointing = None,
    optimizer: OptimizerChoice = None,
    ema: Ema = None,
    textures: Textures = None,
    views: Views = None,
    scale: Scale = None,
    overlap: Overlap = None,
    exclude: Exclude = None,
    include: Include = None,
    anomalies: Anomalies = True,
    target_fpr: TargetFpr = 0.05,
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train together, on one GPU each")] = 1,
    device: DeviceChoice = None,
    address: Address = None,
) -> None:
    """Train a bundle on good images and calibrate it. The same command resumes an interrupted training."""
    from pipelines.train.job import describe_end
    from pipelines.train.job import train as run
    from pipelines.train.plan import TrainRequest

    request = TrainRequest(
        dataset=dataset,
        category=category,
        base=base,
        out=out,
        recipe=category_file.recipe(ctx.params),
        part=part,
        textures=textures,
        views=category_file.views(views, scale, overlap),
        device=device,
        workers=workers,
        target_fpr=target_fpr,
        address=address,
        exclude=exclude,
        include=include,
    )
    with says_if_stopped("the same command continues from the last checkpoint"):
        run(request, Console())
    Console().print("\n".join(describe_end(out)), highlight=False, markup=False, soft_wrap=True)


@commands.command(epilog="Example: glad retrain mvtec --out s3://bucket/models --promote gate")
def retrain(
    ctx: typer.Context,
    dataset: Annotated[str, typer.Argument(help="Dataset in the layout of MVTec-AD or VisA, local or s3://")],
    out: Annotated[str, typer.Option(help="Model registry to write to: a folder, local or s3://")],
    categories: Annotated[str, typer.Option(help="Categories to train: all, or a,b,c")] = "all",
    settings: Annotated[
        str | None,
        typer.Option(help="YAML file, local or s3://, with options of single categories, which win over those here"),
    ] = None,
    base: Base = "small",
    part: PartChoice = "unet",
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    micro_batch: MicroBatch = None,
    precision: PrecisionChoice = None,
    gradient_checkpointing: GradientCheckpointing = None,
    optimizer: OptimizerChoice = None,
    ema: Ema = None,
    textures: Textures = None,
    views: Views = None,
    scale: Scale = None,
    overlap: Overlap = None,
    exclude: Exclude = None,
    include: Include = None,
    anomalies: Anomalies = True,
    target_fpr: TargetFpr = 0.05,
    promote: Annotated[
        Promote, typer.Option(help="New versions to put into use; gate: those that detect no worse than the current")
    ] = "gate",
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="Loss of AUROC, the detection quality from 0 to 1, that the gate allows")
    ] = 0.02,
    max_parallel: Annotated[
        int | None, typer.Option(min=1, help="Categories to train at a time; default: as many as fit")
    ] = None,
    workers_per_category: Annotated[int, typer.Option(min=1, help="Processes that train one category")] = 1,
    seed: Seed = 0,
    device: DeviceChoice = None,
    address: Address = None,
) -> None:
    """Train a model per category into a registry; if repeated, only what is missing. Exit code 1 if any failed."""
    from pipelines.train import retrain as job
    from pipelines.train.plan import TrainRequest

    request = TrainRequest(
        dataset=dataset,
        category=categories,
        base=base,
        out=out,
        recipe=category_file.recipe(ctx.params),
        part=part,
        textures=textures,
        views=category_file.views(views, scale, overlap),
        device=device,
        workers=workers_per_category,
        target_fpr=target_fpr,
        address=address,
        exclude=exclude,
        include=include,
    )
    by_category = category_file.read(settings, ctx) if settings else {}
    with says_if_stopped("the same command trains what is missing"):
        succeeded = job.retrain(job.RetrainRequest(request, max_parallel, promote, margin, by_category), Console())
    if not succeeded:
        raise typer.Exit(STOPPED)


@commands.command(epilog="Example: glad calibrate good/ --model bundle --out calibrated --target-fpr 0.01")
def calibrate(
    model: Annotated[str, typer.Option(help="Bundle to calibrate, local or s3://; 'small' is the built-in one")],
    out: Annotated[str, typer.Option(help="Calibrated bundle to write, local or s3://")],
    good: Annotated[
        str | None,
        typer.Argument(help="Good images that the model was not trained on: folder, glob, list or tar files"),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(help="Instead of images: results of a `glad score` over good images, with --threshold-only"),
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Share of good images that may be called anomalous by mistake")
    ] = 0.05,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0.5, max=0.9999, help="With which --target-fpr holds for this very threshold; default: on average only"
        ),
    ] = None,
    threshold_only: Annotated[
        bool, typer.Option("--threshold-only", help="Keep the denoising steps, choose the decision threshold only")
    ] = False,
    foreground: Annotated[
        int,
        typer.Option(
            min=1,
            max=3,
            help="Where to put synthetic anomalies: 1 on an object darker than its background, 2 brighter, 3 anywhere",
        ),
    ] = 3,
    profile: Annotated[
        Profile | None,
        typer.Option(help="exact: denoise step by step; fast: a single network call; default: as the bundle does"),
    ] = None,
    feedback: Annotated[
        bool,
        typer.Option(
            "--feedback",
            help="Leave out images of --run confirmed as anomalous in `glad view`, where all alarms have to be marked",
        ),
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Even if far more images of --run are alarms than good ones can be")
    ] = False,
    seed: Seed = 0,
    address: Address = None,
) -> None:
    """Choose a bundle's denoising steps and decision threshold from good images; prints how many the target needs."""
    from pipelines.train import calibrate as job

    if (good is None) == (run is None):
        raise GladError("give either good images or --run, the results of scoring some")
    request = job.CalibrateRequest(
        source=good,
        run=run,
        model=model,
        out=out,
        target_fpr=target_fpr,
        confidence=confidence,
        anyway=anyway,
        threshold_only=threshold_only,
        foreground_mode=foreground,  # type: ignore[arg-type]  # 1, 2 or 3 by its min and max
        profile=profile,
        feedback=feedback,
        seed=seed,
        address=address,
    )
    with says_if_stopped("nothing was written"):
        model_id = job.calibrate(request, Console())
    Console().print(f"bundle {model_id} in {escape(out)}", highlight=False)
