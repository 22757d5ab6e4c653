"""Commands that hand results to other programs, and take people's marks back: export, feedback."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from pipelines.cli.options import Json, Results, print_json

commands = typer.Typer()


@commands.command(epilog="Example: glad export monday --csv --coco --verdict anomalous --out monday-export")
def export(
    results: Results,
    csv: Annotated[bool, typer.Option("--csv", help="verdicts.csv, for a spreadsheet")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="masks/ and heat/, a PNG for each image")] = False,
    coco: Annotated[bool, typer.Option("--coco", help="coco.json, the regions of all alarms")] = False,
    label_studio: Annotated[
        bool, typer.Option("--label-studio", help="label-studio.json, tasks with predictions, and its label-studio.xml")
    ] = False,
    delta: Annotated[
        bool, typer.Option("--delta", help="Register the run's own Parquet files as a Delta table, in RESULTS/results")
    ] = False,
    iceberg: Annotated[
        bool, typer.Option("--iceberg", help="Register the run's own Parquet files as an Iceberg table, in OUT/iceberg")
    ] = False,
    out: Annotated[str, typer.Option(help="Folder to write, local or s3://")] = "export",
    text: Annotated[str, typer.Option(help="Only images with this text in their name or folder")] = "",
    category: Annotated[str, typer.Option(help="Only images of this category")] = "",
    verdict: Annotated[Literal["anomalous", "good"] | None, typer.Option(help="Only images with this verdict")] = None,
    reason: Annotated[str, typer.Option(help="Only images that stopped for this reason, as in the results")] = "",
    mark: Annotated[
        Literal["confirmed", "false_alarm", "marked", "unmarked"] | None,
        typer.Option(help="Only images with this feedback"),
    ] = None,
    low: Annotated[float | None, typer.Option(help="Only images with this score or a higher one")] = None,
    high: Annotated[float | None, typer.Option(help="Only images with this score or a lower one")] = None,
    as_json: Json = False,
) -> None:
    """Write a run for spreadsheets, annotation tools and table formats, filtered as in `glad view`."""
    from pipelines.export.job import Kind
    from pipelines.export.job import export as write
    from pipelines.runs.query import Query

    wanted: dict[Kind, bool] = {
        "csv": csv,
        "masks": masks,
        "coco": coco,
        "label-studio": label_studio,
        "delta": delta,
        "iceberg": iceberg,
    }
    query = Query(
        text=text, category=category, verdict=verdict or "", reason=reason, mark=mark or "", low=low, high=high
    )
    done = write(
        results, [kind for kind, is_wanted in wanted.items() if is_wanted], query, out, Console(stderr=as_json)
    )
    if as_json:
        print_json(done)


@commands.command(epilog="Example: glad feedback monday --label-studio project-1.json")
def feedback(
    results: Results,
    label_studio: Annotated[
        str, typer.Option("--label-studio", help="Export of a Label Studio project, JSON or JSON-MIN, local or s3://")
    ],
    as_json: Json = False,
) -> None:
    """Keep what people chose in Label Studio as feedback of the run, as if they had marked it in `glad view`."""
    from pipelines.export.label_studio import read_feedback
    from pipelines.runs.run import Run

    done, console = read_feedback(Run.at(results), label_studio), Console(stderr=as_json)
    console.print(f"{done['kept']} images marked", highlight=False)
    for reason, number in done["left_out"].items():
        console.print(f"[yellow]left out: {number} {reason}[/yellow]", highlight=False, markup=True, soft_wrap=True)
    if as_json:
        print_json(done)
