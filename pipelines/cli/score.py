"""`glad score` and `glad status`: score an archive, and see how far that is."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from glad_core.bundle.settings import Precision, Search
from pipelines.cli.errors import STOPPED, UsageError, fail
from pipelines.cli.options import Address, Json, Results
from pipelines.cli.stopping import says_if_stopped
from pipelines.score.request import Maps, Method, Pages, ScoreRequest

commands = typer.Typer()
OUT = "Folder for the results, local or s3://"


@commands.command(epilog="Example: glad score photos/ --out results --model bundle")
def score(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="Images: folder, glob, dataset (MVTec-AD, VisA), list (.txt, .csv, .parquet), tar files; local or s3://"
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Bundle that judges, as `glad train` makes one, or registry, local or s3://; 'small' is the demo's, "
            "trained on drawn circuit boards"
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help=f"{OUT}. Without it the verdict on a single picture is printed")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Category to score of a dataset, or whose model to take from a registry")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images in progress per actor; default: 16 on a CPU, 8 on a GPU. Results do not depend on it"
        ),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Actors: processes with a copy of the model each; default: as many as fit")
    ] = None,
    num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs per actor; 0.5: two actors share one")] = None,
    num_cpus: Annotated[float | None, typer.Option(min=0.1, help="CPUs per actor")] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the random noise; with the same seed an image gets the same result again")
    ] = 0,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop with exit code 1 if more images than this fail")
    ] = None,
    decode_seconds: Annotated[
        int, typer.Option(min=1, help="CPU seconds that decoding one image may take; past them it counts as an error")
    ] = 20,
    pages: Annotated[
        Pages, typer.Option(help="Of a TIFF or an animation: judge all pages, each as an image, or the first alone")
    ] = "all",
    maps: Annotated[
        Maps, typer.Option(help="Stored anomaly maps: token has one value per patch of the image, full one per pixel")
    ] = "token",
    reconstructions: Annotated[
        bool, typer.Option("--reconstructions", help="Store what each image looks like without defects, as PNG")
    ] = False,
    address: Address = None,
    new: Annotated[
        bool,
        typer.Option(
            "--new", help="Add what has come to SOURCE since to the run in --out; repeat it, for a folder that grows"
        ),
    ] = False,
    notify: Annotated[
        str | None,
        typer.Option(help="URL that gets a message about alarms and the end of the run, signed with GLAD_NOTIFY_KEY"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of another run in --out")] = False,
    method: Annotated[
        Method,
        typer.Option(help="nearest replaces GLAD by a cheap baseline: compare patches with those of --good images"),
    ] = "glad",
    good: Annotated[str | None, typer.Option(help="Good images for --method nearest: folder, glob or list")] = None,
    search: Annotated[
        Search | None,
        typer.Option(
            help="scan: check an image after every denoising step; guarded: skip checks that calibration showed to be "
            "needless; default: guarded, if the bundle is calibrated for it"
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Number format of matrix products: off is float32; the others change scores a little"),
    ] = "off",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model with torch.compile: starts minutes later, runs faster")
    ] = False,
) -> None:
    """Score every image of an archive. Unreadable images are listed in OUT/errors and do not stop the job."""
    request = ScoreRequest(
        source=source,
        out=out or "",
        model=model,
        category=category,
        batch_size=batch_size,
        actors=actors,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        seed=seed,
        max_errors=max_errors,
        decode_seconds=decode_seconds,
        pages=pages,
        maps=maps,
        reconstructions=reconstructions,
        address=address,
        overwrite=overwrite,
        method=method,
        good=good,
        search=search,
        precision=precision,
        compiled=compiled,
        new=new,
        notify=notify,
    )
    if out is None:
        _judge_one(request, ctx)
        return
    from pipelines.score import job

    try:
        with says_if_stopped(f"the same command {'without --overwrite ' if overwrite else ''}continues"):
            counts = job.score(request, Console())
            job.print_end(out, counts, Console())
    except job.NothingNew as line:
        Console().print(str(line), highlight=False, markup=False, soft_wrap=True)
    except job.TooManyErrors as error:
        fail(str(error), STOPPED)


def _judge_one(request: ScoreRequest, ctx: typer.Context) -> None:
    """Print the verdict on a single picture. Raises UsageError for any other archive: it needs --out."""
    from cluster.storage import Storage
    from pipelines.score.one_picture import is_picture, print_verdict

    if not is_picture(request.source, Storage.from_environment()):
        raise UsageError(f"Missing option '--out': {OUT}", ctx=ctx)
    print_verdict(request, Console())


@commands.command(epilog="Example: glad status s3://bucket/results --json")
def status(results: Results, as_json: Json = False) -> None:
    """Show how far a run is: images done, anomalies, errors. Works wherever the results can be read."""
    from pipelines.runs.status import print_status

    print_status(results, as_json, Console())
