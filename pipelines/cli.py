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


Part = StrEnum("Part", ["unet", "dino", "vae"])
Precision = StrEnum("Precision", ["off", "bf16", "fp16"])
Optimizer = StrEnum("Optimizer", ["adamw", "adamw8bit", "muon"])
Device = StrEnum("Device", ["cpu", "cuda", "mps"])
Method = StrEnum("Method", ["glad", "nearest"])
Promote = StrEnum("Promote", ["always", "gate", "never"])


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
    method: Annotated[
        Method, typer.Option(help="nearest: compare with remembered good patches instead, a cheap yardstick")
    ] = Method.glad,
    good: Annotated[str | None, typer.Option(help="Good images for --method nearest: folder, glob or list")] = None,
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
        method=method.value,  # type: ignore[arg-type]
        good=good,
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


@app.command()
def evaluate(
    results: Annotated[str, typer.Argument(help="The --out of a `glad score`, local or s3://")],
    dataset: Annotated[str, typer.Option(help="Dataset with ground truth: MVTec-AD's layout or VisA's")],
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.csv, metrics.md and metrics.json")] = None,
    pro_limit: Annotated[float, typer.Option(min=0.001, max=1, help="Largest false positive rate of PRO")] = 0.3,
    pro_thresholds: Annotated[
        int | None, typer.Option(min=2, help="Count PRO at so many even thresholds (published: 200) instead of at all")
    ] = None,
) -> None:
    """The paper's tables: detection and localisation metrics by category, with the published figures beside them."""
    from pipelines.evaluate import evaluate as run

    run(results, dataset, Console(), out=out, pro_limit=pro_limit, pro_thresholds=pro_thresholds)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Bundle to calibrate; 'small' is the embedded one")],
    out: Annotated[Path, typer.Option(help="Calibrated bundle to write")],
    good: Annotated[
        str | None, typer.Argument(help="Good images the model was not trained on: folder, glob, list or tar shards")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Instead of images: a finished `glad score` over good images")] = None,
    target_fpr: Annotated[float, typer.Option(min=0.0001, max=0.5, help="False-positive rate of the threshold")] = 0.05,
    threshold_only: Annotated[bool, typer.Option("--threshold-only", help="Keep T, δ and min_step")] = False,
    foreground: Annotated[
        int, typer.Option(min=1, max=3, help="Synthetic anomalies on 1 darker, 2 brighter object, 3 anywhere")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and synthetic anomalies")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster: host:port or auto; else this machine")] = None,
) -> None:
    """T, δ, min_step and the decision threshold from good images alone; says how many the target needs."""
    from pipelines import calibrate as job

    if (good is None) == (run is None):
        raise GladError("give either good images or --run, the results of scoring some")
    request = job.CalibrateRequest(good, run, model, out, target_fpr, threshold_only, foreground, seed, address)
    Console().print(f"bundle {job.calibrate(request, Console())} in {escape(str(out))}", highlight=False)


@app.command()
def ablate(
    dataset: Annotated[str, typer.Argument(help="Dataset with ground truth, or one category's folder")],
    model: Annotated[str, typer.Option(help="Bundle trained with synthetic anomalies")],
    plain: Annotated[str, typer.Option(help="Bundle trained without: glad train --no-anomalies")],
    out: Annotated[Path, typer.Option(help="Folder for the runs and tables; complete runs are not repeated")],
    category: Annotated[str | None, typer.Option(help="Category within an MVTec-AD folder")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the noise")] = "0,1,2",
) -> None:
    """The paper's Tables 3 and 4: what ADS, ATP and SAFF bring, and fixed against adaptive steps."""
    from pipelines.ablate import ablate as run

    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise GladError(f"--seeds {seeds}: give whole numbers with commas between, such as 0,1,2") from error
    run(dataset, category, model, plain, chosen, out, Console())


@app.command()
def drift(
    first: Annotated[str, typer.Argument(help="A finished run, e.g. over calibration images")],
    second: Annotated[str, typer.Argument(help="Another, e.g. tonight's")],
    out: Annotated[Path | None, typer.Option(help="PNG of both distributions")] = None,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Probability of a false alarm")] = 0.01,
) -> None:
    """Whether two runs' scores and stop steps are distributed alike. Exit code 1 if they are not."""
    from pipelines.drift import drift as compare

    if compare(first, second, out, Console(), alpha=alpha):
        raise typer.Exit(STOPPED)


datasets_app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Look at datasets with ground truth.")
app.add_typer(datasets_app, name="datasets")


@datasets_app.callback()
def _datasets() -> None: ...


@datasets_app.command("check")
def datasets_check(path: Annotated[str, typer.Argument(help="Dataset folder, local or s3://")]) -> None:
    """What a dataset holds and what is wrong with it: unreadable files, missing or misfitting masks (exit code 1)."""
    from pipelines.datasets import check

    if not check(path, Console()):
        raise typer.Exit(STOPPED)


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
    dataset: Annotated[str, typer.Argument(help="MVTec-AD tree, or one category's folder with train/good in it")],
    out: Annotated[str, typer.Option(help="Bundle to write, local or s3://")],
    category: Annotated[
        str | None, typer.Option(help="Category within the tree; a,b,c or all: one model for several")
    ] = None,
    base: Annotated[str, typer.Option(help="Bundle to start from; 'small' is the embedded one")] = "small",
    part: Annotated[Part, typer.Option(help="What to train: the UNet (ATP), or adapt the DINO or the VAE")] = Part.unet,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the base recommends")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step; the base recommends")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="The base recommends")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per pass and worker; gradients accumulate to --batch-size")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the matrix products; the base recommends")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, a third more time")
    ] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="adamw8bit needs bitsandbytes and a GPU")] = None,
    ema: Annotated[float | None, typer.Option(min=0, max=1, help="Decay of averaged weights; the base says")] = None,
    textures: Annotated[str | None, typer.Option(help="Folder of texture pictures for synthetic anomalies")] = None,
    anomalies: Annotated[
        bool, typer.Option("--anomalies/--no-anomalies", help="Without: a plain diffusion model, for comparison")
    ] = True,
    target_fpr: Annotated[float, typer.Option(min=0.001, max=0.5, help="False-positive rate of the threshold")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes training together, one GPU each")] = 1,
    device: Annotated[Device | None, typer.Option(help="cuda where there is a GPU, else cpu")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster: host:port or auto; else this machine")] = None,
) -> None:
    """Fine-tune a bundle on good images (ATP) and calibrate it; the same command goes on after being killed."""
    from pipelines.train import TrainRequest
    from pipelines.train import train as run

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
    )
    model_id = run(request, Console())
    Console().print(f"bundle {model_id} in {escape(out)}", highlight=False)


@app.command()
def retrain(
    dataset: Annotated[str, typer.Argument(help="MVTec-AD tree, local or s3://")],
    out: Annotated[str, typer.Option(help="Model registry: a folder, local or s3://")],
    categories: Annotated[str, typer.Option(help="all, or a,b,c")] = "all",
    base: Annotated[str, typer.Option(help="Bundle to start from; 'small' is the embedded one")] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the base recommends")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step; the base recommends")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="The base recommends")] = None,
    textures: Annotated[str | None, typer.Option(help="Folder of texture pictures for synthetic anomalies")] = None,
    target_fpr: Annotated[float, typer.Option(min=0.001, max=0.5, help="False-positive rate of the threshold")] = 0.05,
    promote: Annotated[
        Promote, typer.Option(help="gate: only a version that detects no worse goes live")
    ] = Promote.gate,
    margin: Annotated[float, typer.Option(min=0, max=1, help="AUROC that the gate lets a version lose")] = 0.02,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="Categories at a time; as many as fit")] = None,
    workers_per_category: Annotated[int, typer.Option(min=1, help="Processes training one category")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random")] = 0,
    device: Annotated[Device | None, typer.Option(help="cuda where there is a GPU, else cpu")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster: host:port or auto; else this machine")] = None,
) -> None:
    """Retrain categories side by side into a registry; again, it does what is missing. Exit code 1 if any failed."""
    from pipelines import retrain as job
    from pipelines.train import TrainRequest

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


registries = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Look at a model registry and switch versions.")
app.add_typer(registries, name="registry")
Registry = Annotated[str, typer.Argument(help="The --out of a `glad retrain`, local or s3://")]
Category = Annotated[str, typer.Argument(help="Category in the registry")]


@registries.command("list")
def registry_list(registry: Registry) -> None:
    """Every category's current version."""
    from pipelines.registry import print_list

    print_list(registry, Console())


@registries.command("show")
def registry_show(registry: Registry, category: Category) -> None:
    """A category's versions."""
    from pipelines.registry import print_versions

    print_versions(registry, category, Console())


@registries.command("promote")
def registry_promote(
    registry: Registry, category: Category, version: Annotated[str, typer.Argument(help="Version to score with")]
) -> None:
    """Make a version the current one."""
    from cluster.storage import Storage
    from pipelines import registry as models

    models.promote(models.absolute(registry), category, version, Storage.from_environment(), "by hand")
    Console().print(f"{category}: {version} is current", highlight=False)


@registries.command("rollback")
def registry_rollback(registry: Registry, category: Category) -> None:
    """Make the version before the current one current again."""
    from cluster.storage import Storage
    from pipelines import registry as models

    chosen = models.rollback(models.absolute(registry), category, Storage.from_environment())
    Console().print(f"{category}: {chosen.version} is current again", highlight=False)


bundles = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Make and inspect model bundles.")
app.add_typer(bundles, name="bundle")


@bundles.command("create")
def bundle_create(
    diffusion: Annotated[str, typer.Argument(help="Stable Diffusion folder in diffusers format, or hub id")],
    out: Annotated[Path, typer.Option(help="Bundle to write")],
    features: Annotated[str, typer.Option(help="timm name of the ViT")] = "vit_base_patch8_224.dino",
    preset: Annotated[str | None, typer.Option(help="Published settings, DATASET/CATEGORY: MVTec-AD/screw")] = None,
    category: Annotated[str, typer.Option(help="What the model judges; a,b,c: one model for several")] = "",
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
