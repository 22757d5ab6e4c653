"""Commands about the installation itself: config, doctor. `pipelines.cli` adds them to `glad`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.cli_models import Json, print_json

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
    from pipelines.config import effective

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


def add_to(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.add_typer(configs, name="config")
