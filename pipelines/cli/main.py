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
from pipelines.cli import jobs, models, setup
from pipelines.cli.models import STOPPED, Address, Json, Precision, print_json

USER_ERROR = 2  # exit code of a mistake in what was asked
UsageError: Any = typer.BadParameter.__base__  # of the click that typer uses, its own or the package


class OneLineErrors(TyperGroup):
    """A user's mistake is one line on stderr and exit code 2, never a traceback."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)
        except UsageError as error:
            _misused(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            _misused(error)
        except (GladError, StorageError, SessionError) as error:
            _fail(str(error), USER_ERROR)


app = typer.Typer(
    cls=OneLineErrors,
    context_settings={"auto_envvar_prefix": "GLAD"},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find defects in photos with GLAD, adaptive diffusion anomaly detection, on Ray.",
    epilog="Exit codes: 0 all well; 1 the job stopped, or found what it looks for (drift, a damaged dataset); "
    "2 a mistake in what was asked.",
)


@app.callback()
def glad(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Options of commands; ./glad.yaml where there is one")] = None,
) -> None:
    default = Path("glad.yaml")
    if config is not None or default.is_file():
        from pipelines.cli.config_file import read

        ctx.default_map = read(config or default, ctx)


Method = StrEnum("Method", ["glad", "nearest"])
Search = StrEnum("Search", ["scan", "guarded"])
Profile = StrEnum("Profile", ["exact", "fast"])


class Maps(StrEnum):
    token = "token"
    full = "full"


@app.command(epilog="Example: glad score photos/ --out results --model bundle")
def score(
    source: Annotated[
        str,
        typer.Argument(help="Folder, glob, MVTec-AD category, URI list (.txt, .parquet) or tar shards; local or s3://"),
    ],
    out: Annotated[str, typer.Option(help="Folder for the results, local or s3://")],
    model: Annotated[str, typer.Option(help="Model bundle, local or s3://; 'small' is the embedded one")] = "small",
    category: Annotated[str | None, typer.Option(help="Category within an MVTec-AD folder")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images in flight per actor, 16 on a CPU and 8 on a GPU; changes no result"),
    ] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="Model copies at work; as many as fit by default")] = None,
    num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs per actor, fractions allowed")] = None,
    num_cpus: Annotated[float | None, typer.Option(min=0.1, help="CPUs per actor")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; with the image id it fixes the result")] = 0,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop with exit code 1 once more images than this have failed")
    ] = None,
    maps: Annotated[Maps, typer.Option(help="Resolution of the stored anomaly maps")] = Maps.token,
    reconstructions: Annotated[bool, typer.Option("--reconstructions", help="Store reconstructions as PNG")] = False,
    address: Address = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run's results in --out")] = False,
    method: Annotated[
        Method, typer.Option(help="nearest: compare with remembered good patches instead, a cheap yardstick")
    ] = Method.glad,
    good: Annotated[str | None, typer.Option(help="Good images for --method nearest: folder, glob or list")] = None,
    search: Annotated[
        Search | None,
        typer.Option(help="How an image's step is found: by comparing all, or where a calibrated bound leaves doubt"),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the matrix products; a lower one changes scores a little")
    ] = Precision.off,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile: minutes of start for more speed")] = False,
) -> None:
    """Score every image of an archive; unreadable ones are listed in OUT/errors and do not stop the job."""
    from pipelines.score import job

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
        search=search.value if search else None,  # type: ignore[arg-type]
        precision=precision.value,  # type: ignore[arg-type]
        compiled=compiled,
    )
    try:
        job.score(request, Console())
    except job.TooManyErrors as error:
        _fail(str(error), STOPPED)


@app.command(epilog="Example: glad status s3://bucket/results --json")
def status(
    results: Annotated[str, typer.Argument(help="The --out of a `glad score`, local or s3://")],
    as_json: Json = False,
) -> None:
    """How far a run is: images done, anomalies, errors; from any machine that can read its output."""
    from pipelines.runs.status import print_status

    print_status(results, as_json, Console())


@app.command(epilog="Example: glad show results --top 50 --out sheet.png")
def show(
    results: Annotated[str, typer.Argument(help="The --out of a `glad score`, local or s3://")],
    top: Annotated[int, typer.Option(min=1, max=200, help="Images to show, highest scores first")] = 20,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("sheet.png"),
) -> None:
    """Draw a contact sheet of a run: input, reconstruction, heat map, score, stop step."""
    from pipelines.report.contact_sheet import show as draw

    draw(results, top, out, Console())


@app.command(epilog="Example: glad report results --out report.html")
def report(
    results: Annotated[str, typer.Argument(help="The --out of a `glad score`, local or s3://")],
    out: Annotated[Path, typer.Option(help="HTML page to write")] = Path("report.html"),
    dataset: Annotated[str | None, typer.Option(help="Ground truth, as `glad evaluate` reads it")] = None,
    top: Annotated[int, typer.Option(min=1, max=2000, help="Images to show, most anomalous first")] = 500,
) -> None:
    """One self-contained page: totals of a run and its most anomalous images, to filter, sort and print."""
    from pipelines.report.page import report as write

    write(results, out, Console(), dataset=dataset, top=top)


@app.command(epilog="Example: glad view s3://verdicts/monday")
def view(
    results: Annotated[str, typer.Argument(help="The --out of a `glad score`, local or s3://")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="On this machine only; a free one by default")] = 0,
) -> None:
    """The report's page over all results, read as needed, with feedback kept in RESULTS/feedback. Ctrl-C ends it."""
    from pipelines.report.server import view as serve

    serve(results, port, Console())


@app.command(epilog="Example: glad evaluate results --dataset mvtec --out tables")
def evaluate(
    results: Annotated[str, typer.Argument(help="The --out of a `glad score`, local or s3://")],
    dataset: Annotated[str, typer.Option(help="Dataset with ground truth: MVTec-AD's layout or VisA's")],
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.csv, metrics.md and metrics.json")] = None,
    pro_limit: Annotated[float, typer.Option(min=0.001, max=1, help="Largest false positive rate of PRO")] = 0.3,
    pro_thresholds: Annotated[
        int | None, typer.Option(min=2, help="Count PRO at so many even thresholds (published: 200) instead of at all")
    ] = None,
    as_json: Json = False,
) -> None:
    """The paper's tables: detection and localisation metrics by category, with the published figures beside them."""
    from pipelines.evaluate.tables import evaluate as run

    console = Console(stderr=as_json)
    metrics = run(results, dataset, console, out=out, pro_limit=pro_limit, pro_thresholds=pro_thresholds)
    if as_json:
        print_json(metrics)


@app.command(epilog="Example: glad calibrate good/ --model bundle --out calibrated --target-fpr 0.01")
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
    profile: Annotated[
        Profile | None, typer.Option(help="fast: one UNet call instead of steps; as the bundle has it by default")
    ] = None,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="--run is any run: what `glad view` did not confirm as anomalous is good")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and synthetic anomalies")] = 0,
    address: Address = None,
) -> None:
    """T, δ, min_step and the decision threshold from good images alone; says how many the target needs."""
    from pipelines.train import calibrate as job

    if (good is None) == (run is None):
        raise GladError("give either good images or --run, the results of scoring some")
    request = job.CalibrateRequest(
        source=good,
        run=run,
        model=model,
        out=out,
        target_fpr=target_fpr,
        threshold_only=threshold_only,
        foreground_mode=foreground,  # type: ignore[arg-type]
        profile=profile.value if profile else None,  # type: ignore[arg-type]
        feedback=feedback,
        seed=seed,
        address=address,
    )
    Console().print(f"bundle {job.calibrate(request, Console())} in {escape(str(out))}", highlight=False)


@app.command(epilog="Example: glad ablate mvtec/screw --model bundle --plain plain --out ablation")
def ablate(
    dataset: Annotated[str, typer.Argument(help="Dataset with ground truth, or one category's folder")],
    model: Annotated[str, typer.Option(help="Bundle trained with synthetic anomalies")],
    plain: Annotated[str, typer.Option(help="Bundle trained without: glad train --no-anomalies")],
    out: Annotated[Path, typer.Option(help="Folder for the runs and tables; complete runs are not repeated")],
    category: Annotated[str | None, typer.Option(help="Category within an MVTec-AD folder")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the noise")] = "0,1,2",
) -> None:
    """The paper's Tables 3 and 4: what ADS, ATP and SAFF bring, and fixed against adaptive steps."""
    from pipelines.evaluate.ablate import ablate as run

    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise GladError(f"--seeds {seeds}: give whole numbers with commas between, such as 0,1,2") from error
    run(dataset, category, model, plain, chosen, out, Console())


@app.command(epilog="Example: glad drift calibration-run tonight --out drift.png")
def drift(
    first: Annotated[str, typer.Argument(help="A finished run, e.g. over calibration images")],
    second: Annotated[str, typer.Argument(help="Another, e.g. tonight's")],
    out: Annotated[Path | None, typer.Option(help="PNG of both distributions")] = None,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Probability of a false alarm")] = 0.01,
    as_json: Json = False,
) -> None:
    """Whether two runs' scores and stop steps are distributed alike. Exit code 1 if they are not."""
    from pipelines.report.drift import drift as compare

    found = compare(first, second, out, Console(stderr=as_json), alpha=alpha)
    if as_json:
        print_json(found)
    if any(of["differs"] for of in found.values()):
        raise typer.Exit(STOPPED)


cluster_app = typer.Typer(no_args_is_help=True, help="Look at cluster files.")
app.add_typer(cluster_app, name="cluster")


@cluster_app.command("check", epilog="Example: glad cluster check ray_cluster.yaml")
def cluster_check(
    file: Annotated[Path, typer.Argument(help="A file for `ray up` or KubeRay, such as ray_cluster.yaml")],
) -> None:
    """What is wrong with a cluster file, before a machine is started (exit code 1), and what is still to be changed."""
    from cluster.check_file import check_cluster_file

    problems, unchanged = check_cluster_file(file)
    console = Console()
    for problem in problems:
        console.print(f"[red]wrong[/red]  {escape(problem)}", highlight=False, soft_wrap=True)
    for example in unchanged:
        console.print(f"[yellow]change[/yellow] {escape(example)}", highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(STOPPED)
    if not unchanged:
        console.print("nothing wrong found", highlight=False)


datasets_app = typer.Typer(no_args_is_help=True, help="Look at datasets with ground truth.")
app.add_typer(datasets_app, name="datasets")


@datasets_app.command("check", epilog="Example: glad datasets check s3://bucket/mvtec")
def datasets_check(
    path: Annotated[str, typer.Argument(help="Dataset folder, local or s3://")], as_json: Json = False
) -> None:
    """What a dataset holds and what is wrong with it: unreadable files, missing or misfitting masks (exit code 1)."""
    from pipelines.evaluate.datasets import check

    found = check(path, Console(stderr=as_json))
    if as_json:
        print_json(found)
    if found["problems"]:
        raise typer.Exit(STOPPED)


@app.command("demo-data", epilog="Example: glad demo-data demo-data --seed 1")
def demo_data(
    out: Annotated[Path, typer.Argument(help="Folder for the MVTec-AD tree")],
    seed: Annotated[int, typer.Option(help="Seed of the pictures")] = 0,
) -> None:
    """Draw the demo category: circuit boards, good ones and four kinds of defect with their masks."""
    from pipelines.demo.boards import make_demo_data

    folder = make_demo_data(out, seed)
    Console().print(f"demo data in {escape(str(folder))}", highlight=False)


@app.command(epilog="Example: glad demo --out demo-output")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data, the results, the sheet and metrics.json")] = Path(
        "demo-output"
    ),
) -> None:
    """Make demo data, score it with the small model, and show what was found."""
    from pipelines.demo.job import demo as run

    run(out, Console())


models.add_to(app)
jobs.add_to(app)
setup.add_to(app)


def _misused(error: Any) -> NoReturn:
    """A word of the command line that does not fit; a command without any words shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        raise error
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    more = f"; `{error.ctx.command_path} --help` lists what fits" if error.ctx else ""
    _fail(message + more, USER_ERROR)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"[red]Error:[/red] {escape(line)}", highlight=False)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script ``glad``."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
