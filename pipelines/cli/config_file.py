"""glad.yaml: options of commands, read into click's `default_map`, and where each option's value came from.

score:
  batch-size: 16
  out: s3://bucket/results
bundle:
  create:
    preset: MVTec-AD/screw
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
import yaml

from glad_core.errors import GladError, did_you_mean

SOURCES = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}


def read(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """The `default_map` in a file: every section and key checked against the commands of ``ctx``.

    Raises:
        GladError: no such file, no YAML, an unknown section or key (with the nearest known one), or a wrong value.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise GladError(f"{path}: {reason}; name a YAML file with the options of commands") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise GladError(f"{path}: not YAML{where}: {getattr(error, 'problem', error)}; correct it there") from error
    return _section(content or {}, ctx.command, ctx, f"{path}: ", "")


def _section(content: Any, command: Any, ctx: typer.Context, where: str, prefix: str) -> dict[str, Any]:
    """One command's options, or one group's sections."""
    if not isinstance(content, dict):
        raise GladError(f"{where}'{prefix.rstrip('.')}' has to be a table of names and values")
    groups = getattr(command, "commands", None)
    if groups is not None:
        for name in content:
            if name not in groups:
                hint = did_you_mean(str(name), groups)
                raise GladError(f"{where}no command has the section '{prefix}{name}'{hint}")
        return {
            name: _section(inner or {}, groups[name], ctx, where, f"{prefix}{name}.") for name, inner in content.items()
        }
    known = {key_of(parameter): parameter for parameter in _settable(command)}
    values = {}
    for name, value in content.items():
        parameter = known.get(str(name).replace("_", "-"))
        if parameter is None:
            raise GladError(f"{where}unknown key '{prefix}{name}'{did_you_mean(str(name).replace('_', '-'), known)}")
        if value is not None:
            values[parameter.name] = _checked(value, parameter, ctx, f"{where}{prefix}{name}: ")
    return values


def _checked(value: Any, parameter: Any, ctx: typer.Context, where: str) -> Any:
    """The value, if click takes it."""
    flag = getattr(parameter, "is_flag", False)
    if isinstance(value, list | dict) or isinstance(value, bool) != flag:
        raise GladError(f"{where}'{value}' is not {'true or false' if flag else 'one value of the right kind'}")
    try:
        parameter.process_value(ctx, value)
    except typer.BadParameter as error:
        raise GladError(f"{where}'{value}': {error.message}") from error
    return value


def key_of(parameter: Any) -> str:
    """What a parameter is called in the file: the flag without dashes, or the argument's name."""
    long = [name for name in parameter.opts if name.startswith("--")]
    return (long[0].removeprefix("--") if long else parameter.name).replace("_", "-")


def _settable(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.name != "help"]


def effective(ctx: typer.Context, words: list[str]) -> list[dict[str, Any]]:
    """What a command would be run with: ``command``, ``setting``, ``value`` and ``from`` of each of its parameters.

    Args:
        words: a command and any options for it, as they would follow `glad`; empty: every command.

    Raises:
        GladError: no such command, no such option of it, or a value that does not fit.
    """
    top = ctx.find_root()
    return _effective(top.command, top, words, [])


def _effective(command: Any, ctx: Any, words: list[str], called: list[str]) -> list[dict[str, Any]]:
    groups = getattr(command, "commands", None)
    if groups is None:
        _understood(command, ctx, words, f"{' '.join(called)}: ")
        return [
            {
                "command": " ".join(called),
                "setting": key_of(parameter),
                "value": getattr(ctx.params[parameter.name], "value", ctx.params[parameter.name]),
                "from": SOURCES[ctx.get_parameter_source(parameter.name).name],
            }
            for parameter in _settable(command)
        ]
    chosen = words[:1] or sorted(groups)
    rows = []
    for name in chosen:
        if name not in groups:
            raise GladError(f"no command '{' '.join([*called, name])}'{did_you_mean(name, groups)}")
        inner = groups[name]
        rest = words[1:]
        # Parsed as a group, the words after it would be taken for the group's own.
        arguments = [] if hasattr(inner, "commands") else rest
        context = inner.make_context(name, [*arguments], parent=ctx, resilient_parsing=True)
        rows += _effective(inner, context, rest, [*called, name])
    return rows


def _understood(command: Any, ctx: Any, words: list[str], where: str) -> None:
    """Raise GladError for options that click passes over when it may not fail for those that are missing."""
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise GladError(f"{where}no option {name}{did_you_mean(name, sorted(known))}")
    for parameter in _settable(command):
        given = SOURCES[ctx.get_parameter_source(parameter.name).name] != "default"
        if given and ctx.params[parameter.name] is None:
            raise GladError(f"{where}what is given for '{key_of(parameter)}' does not fit; `glad {where[:-2]} --help`")
