"""The `glad` command. Subcommands import what they need when they run, so that `glad --help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli import exports, jobs, models, results, score, setup, train
from pipelines.cli.errors import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    context_settings={"auto_envvar_prefix": "GLAD"},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find defects in photos with GLAD, adaptive diffusion anomaly detection, on Ray.",
    epilog="Exit codes: 0 success; 1 the job stopped, or a check found something (drift, a damaged dataset); "
    "2 a mistake in the command, or Ray or the storage cannot be used; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import glad_core

        print(f"glad {glad_core.__version__}")
        raise typer.Exit


@app.callback()
def glad(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with options of commands; default: ./glad.yaml, if it exists")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    default = Path("glad.yaml")
    if config is not None or default.is_file():
        from pipelines.cli.config_file import read

        ctx.default_map = read(config or default, ctx)


for commands in (
    score.commands,
    results.commands,
    exports.commands,
    train.commands,
    models.commands,
    jobs.commands,
    setup.commands,
):
    app.add_typer(commands)  # without a name: its commands become commands of `glad` itself
