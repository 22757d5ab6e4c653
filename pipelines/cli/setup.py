"""Commands about the installation and first steps: demo, demo-data, doctor, config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.cli.errors import STOPPED
from pipelines.cli.options import Json, on_this_machine, print_json
from pipelines.cli.stopping import says_if_stopped

commands = typer.Typer()
configs = typer.Typer(no_args_is_help=True, help="Show the settings in force, from flags, environment and glad.yaml.")


@commands.command(epilog="Example: glad demo --out demo-output")
def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the data, the results, the contact sheet, the report and metrics.json",
            callback=on_this_machine,
        ),
    ] = Path("demo-output"),
) -> None:
    """Draw demo data, score it with the built-in model, and show the results."""
    from pipelines.demo.job import demo as run

    with says_if_stopped("the same command begins anew"):
        run(out, Console())


@commands.command("demo-data", epilog="Example: glad demo-data demo-data --seed 1")
def demo_data(
    out: Annotated[
        Path, typer.Argument(help="Folder for the pictures, in MVTec-AD's layout", callback=on_this_machine)
    ],
    seed: Annotated[int, typer.Option(help="Seed of the pictures")] = 0,
) -> None:
    """Draw the demo data: circuit boards, good ones and four kinds of defect with their masks."""
    from pipelines.demo.boards import make_demo_data

    folder = make_demo_data(out, seed)
    Console().print(f"demo data in {escape(str(folder))}", highlight=False)


@commands.command(epilog="Example: glad doctor --storage s3://bucket/results")
def doctor(
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to check, host:port or auto; default: Ray on this machine")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Check that this folder can be written as well, local or s3://")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check packages, devices, disk, memory and Ray; also a folder, if given. Exit code 1 if any is wrong."""
    from pipelines.cli import doctor as checks

    findings = checks.examine(address, storage)
    checks.print_table(findings, Console(stderr=as_json))
    if as_json:
        print_json(checks.as_result(findings))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(STOPPED)


@configs.command(
    "show",
    epilog="Example: glad config show score --batch-size 4",
    context_settings={"ignore_unknown_options": True},
)
def config_show(
    ctx: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(help="Command, with options for it; default: every command")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the settings a command would run with, and where each value comes from."""
    from pipelines.cli.config_file import effective

    rows = effective(ctx, command or [])
    if as_json:
        print_json({"settings": [row | {"value": _json_value(row["value"])} for row in rows]})
        return
    table = Table("command", "setting", "value", "from")
    for row in rows:
        value = "-" if row["value"] is None else escape(str(row["value"]))
        table.add_row(row["command"], row["setting"], value, row["from"])
    Console().print(table)


def _json_value(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float) else str(value)


commands.add_typer(configs, name="config")
