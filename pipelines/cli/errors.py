"""Exit codes, and mistakes as one line on stderr."""

from __future__ import annotations

import signal
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cluster import session
from cluster.session import SessionError
from cluster.storage_errors import StorageError
from glad_core.errors import GladError

STOPPED = 1  # exit code of a job that stopped, or of a check that found something wrong
USER_ERROR = 2  # exit code of a mistake in the command
UsageError: Any = typer.BadParameter.__base__  # some versions of typer bring their own copy of click


class OneLineErrors(TyperGroup):
    """A user's mistake is one line on stderr and exit code 2, never a traceback."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)
        except UsageError as error:
            _fail_on_usage(error)
        except KeyboardInterrupt as error:
            _fail_on_stop(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            _fail_on_usage(error)
        except (GladError, StorageError, SessionError) as error:
            fail(str(error), USER_ERROR)
        except KeyboardInterrupt as error:
            _fail_on_stop(error)


def fail(message: str, code: int) -> NoReturn:
    """Print the message in one line on stderr and exit with ``code``."""
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"[red]Error:[/red] {escape(line)}", highlight=False)
    raise typer.Exit(code)


def _fail_on_stop(error: KeyboardInterrupt) -> NoReturn:
    """Exit because of a signal, in one line with what is known about it: how far the work is, and how it goes on."""
    notes = getattr(error, "__notes__", [])
    line = "; ".join(["stopped", *notes]).replace("stopped; a", "stopped a")
    if session.died():
        fail(f"Ray on this machine died, perhaps for lack of memory: {line}", STOPPED)
    Console(stderr=True, soft_wrap=True).print(escape(line), highlight=False)
    raise typer.Exit(getattr(error, "code", 128 + signal.SIGINT))


def _fail_on_usage(error: Any) -> NoReturn:
    """Exit because of an option or argument that does not fit. (A command without any of them shows its help.)"""
    if type(error).__name__ == "NoArgsIsHelpError":
        raise error
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    if type(error).__name__ == "MissingParameter" and error.param and error.param.help:
        message += f": {error.param.help}"
    message += _hint(error)
    advice = f"; `{error.ctx.command_path} --help` lists what fits" if error.ctx else ""
    fail(message + advice, USER_ERROR)


def _hint(error: Any) -> str:
    """What probably happened, for mistakes whose message does not show it."""
    command = error.ctx.command.name if error.ctx else None
    if command == "submit" and type(error).__name__ == "NoSuchOption":
        return ": the command to run comes after --, as in `glad submit -- score ...`"
    if "unexpected extra argument" in error.format_message():
        return "; if the shell has expanded a pattern such as *.png, put it in quotes"
    return ""
