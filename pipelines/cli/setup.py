"""Commands about the installation itself: config, doctor. `pipelines.cli.main` adds them to `glad`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.cli.models import STOPPED, Json, print_json

configs = typer.Typer(no_args_is_help=True, help="Look at the settings in force: flags, environment, glad.yaml.")


@configs.command(
    "show",
    epilog="Example: glad config show score --batch-size 4",
    context_settings={"ignore_unknown_options": True},
)
def config_show(
    ctx: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(help="Command, with options for it; all by default")] = None,
    as_json: Json = False,
) -> None:
    """What a command would be run with, and where each value comes from."""
    from pipelines.cli.config_file import effective

    rows = effective(ctx, command or [])
    if as_json:
        print_json({"settings": [row | {"value": _plain(row["value"])} for row in rows]})
        return
    table = Table("command", "setting", "value", "from")
    for row in rows:
        shown = "-" if row["value"] is None else escape(str(row["value"]))
        table.add_row(row["command"], row["setting"], shown, row["from"])
    Console().print(table)


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def doctor(
    address: Annotated[str | None, typer.Option(help="Ray cluster to reach as well: host:port or auto")] = None,
    storage: Annotated[str | None, typer.Option(help="Folder to write to as well, local or s3://")] = None,
    as_json: Json = False,
) -> None:
    """Check packages, devices, disk, memory, and a cluster and a storage where given. Exit code 1 if any is wrong."""
    from pipelines.cli import doctor as check

    findings = check.examine(address, storage)
    check.report(findings, Console(stderr=as_json))
    if as_json:
        print_json(check.as_result(findings))
    if any(of.state == "wrong" for of in findings):
        raise typer.Exit(STOPPED)


def add_to(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command(epilog="Example: glad doctor --storage s3://bucket/results")(doctor)
    app.add_typer(configs, name="config")
