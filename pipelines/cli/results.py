"""Commands that read the results of finished runs: show, report, view, evaluate, drift; ablate; datasets check."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from glad_core.errors import GladError
from pipelines.cli.errors import STOPPED
from pipelines.cli.options import Address, Json, Results, print_json
from pipelines.cli.stopping import says_if_stopped

commands = typer.Typer()
datasets = typer.Typer(no_args_is_help=True, help="Check datasets with ground truth.")


@commands.command(epilog="Example: glad show results --top 50 --out sheet.png")
def show(
    results: Results,
    top: Annotated[int, typer.Option(min=1, max=200, help="Number of images to show, highest scores first")] = 20,
    out: Annotated[str, typer.Option(help="PNG file to write, local or s3://")] = "sheet.png",
) -> None:
    """Draw a contact sheet of a run: image, reconstruction, heat map, score and the denoising step it stopped at."""
    from pipelines.report.contact_sheet import show as draw

    draw(results, top, out, Console())


@commands.command(epilog="Example: glad report results --out report.html")
def report(
    results: Results,
    out: Annotated[str, typer.Option(help="HTML page to write, local or s3://")] = "report.html",
    dataset: Annotated[str | None, typer.Option(help="Dataset with ground truth, as for `glad evaluate`")] = None,
    top: Annotated[int, typer.Option(min=1, max=2000, help="Number of images to show, most anomalous first")] = 500,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster that compares with --dataset, host:port or auto; default: this machine"),
    ] = None,
) -> None:
    """Write one self-contained HTML page: a run's totals and its most anomalous images, to filter, sort and print."""
    from pipelines.report.page import report as write

    write(results, out, Console(), dataset=dataset, top=top, address=address)


@commands.command(epilog="Example: glad view s3://verdicts/monday")
def view(
    results: Results,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: any free one")] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets colleagues in who have the link with its token")
    ] = "127.0.0.1",
) -> None:
    """Serve the report over all images to a browser, and keep your feedback in RESULTS/feedback. Ctrl-C ends it."""
    from pipelines.report.server import view as serve

    serve(results, port, Console(), host)


@commands.command(epilog="Example: glad evaluate results --dataset mvtec --out tables")
def evaluate(
    results: Results,
    dataset: Annotated[str, typer.Option(help="Dataset with ground truth, in MVTec-AD's or VisA's layout")],
    out: Annotated[
        str | None, typer.Option(help="Folder for metrics.csv, metrics.md and metrics.json, local or s3://")
    ] = None,
    pro_limit: Annotated[
        float,
        typer.Option(min=0.001, max=1, help="Largest false-positive rate that counts for PRO, the per-region overlap"),
    ] = 0.3,
    pro_thresholds: Annotated[
        int | None,
        typer.Option(min=2, help="Number of even thresholds for PRO (200 in published code); default: every score"),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Compare a run with ground truth: the paper's metrics by category, beside the published figures."""
    from pipelines.evaluate.tables import evaluate as run

    console = Console(stderr=as_json)
    metrics = run(
        results, dataset, console, out=out, address=address, pro_limit=pro_limit, pro_thresholds=pro_thresholds
    )
    if as_json:
        print_json(metrics)


@commands.command(epilog="Example: glad drift calibration-run tonight --out drift.png")
def drift(
    first: Annotated[str, typer.Argument(help="Results of a finished run, such as one over calibration images")],
    second: Annotated[str, typer.Argument(help="Results of another, such as tonight's")],
    out: Annotated[str | None, typer.Option(help="PNG file to write, local or s3://, with both distributions")] = None,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Accepted probability of a false alarm")] = 0.01,
    as_json: Json = False,
) -> None:
    """Compare the distributions of two runs' scores and of the steps they stopped at. Exit code 1 if they differ."""
    from pipelines.report.drift import drift as compare

    comparison = compare(first, second, out, Console(stderr=as_json), alpha=alpha)
    if as_json:
        print_json(comparison)
    if any(category["differs"] for category in comparison.values()):
        raise typer.Exit(STOPPED)


@commands.command(epilog="Example: glad ablate mvtec/screw --model bundle --plain plain --out ablation")
def ablate(
    dataset: Annotated[str, typer.Argument(help="Dataset with ground truth, or the folder of one category")],
    model: Annotated[str, typer.Option(help="Bundle trained with synthetic anomalies")],
    plain: Annotated[str, typer.Option(help="Bundle trained without them: glad train --no-anomalies")],
    out: Annotated[
        str, typer.Option(help="Folder for the runs and tables, local or s3://; complete runs are not repeated")
    ],
    category: Annotated[str | None, typer.Option(help="Category within the dataset")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the random noise, one run each")] = "0,1,2",
    address: Address = None,
) -> None:
    """Measure what each part of GLAD brings: adaptive steps, training with synthetic anomalies, feature fusion.

    These are the paper's Tables 3 and 4.
    """
    from pipelines.evaluate.ablate import ablate as run

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise GladError(f"--seeds {seeds}: give whole numbers with commas between, such as 0,1,2") from error
    with says_if_stopped("the same command repeats no complete run"):
        run(dataset, category, model, plain, numbers, out, Console(), address)


@datasets.command("check", epilog="Example: glad datasets check s3://bucket/mvtec")
def datasets_check(
    path: Annotated[str, typer.Argument(help="Dataset folder, local or s3://")], as_json: Json = False
) -> None:
    """Count a dataset's images, and find unreadable files and masks that are missing or do not fit (exit code 1)."""
    from pipelines.evaluate.datasets import check

    report = check(path, Console(stderr=as_json))
    if as_json:
        print_json(report)
    if report["problems"]:
        raise typer.Exit(STOPPED)


commands.add_typer(datasets, name="datasets")
