"""glad.yaml: options of commands, read into click's `default_map`, and the origin of each option's value.

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

ORIGINS = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}


def read(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """The `default_map` in a file: every section and key checked against the commands of ``ctx``.

    Raises:
        GladError: no such file, no YAML, an unknown section or key (with the nearest known one), or a wrong value.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise GladError(f"{path}: {reason}; name a YAML file with the options of commands") from error
    return _section(parse(text, str(path)), ctx.command, ctx, str(path), "")


def parse(text: str | bytes, file: str) -> dict[str, Any]:
    """The table that a YAML file holds; an empty file holds an empty one.

    Raises:
        GladError: no YAML, or no table.
    """
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise GladError(f"{file}: not YAML{line}: {getattr(error, 'problem', error)}; correct it there") from error
    if not isinstance(content or {}, dict):
        raise GladError(f"{file}: it has to be a table of names and values")
    return content or {}


class _Loader(yaml.SafeLoader):
    """YAML in which a name that is there twice is a mistake; by itself the second would silently win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value:
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _section(content: Any, command: Any, ctx: typer.Context, file: str, parents: str) -> dict[str, Any]:
    """The options of one command, or the sections of a group of commands. ``parents``: names before it, as `bundle.`"""
    if not isinstance(content, dict):
        raise GladError(f"{file}: '{parents.rstrip('.')}' has to be a table of names and values")
    groups = getattr(command, "commands", None)
    if groups is not None:
        for name in content:
            if name not in groups:
                hint = did_you_mean(str(name), groups)
                raise GladError(f"{file}: no command has the section '{parents}{name}'{hint}")
        return {
            name: _section(inner or {}, groups[name], ctx, file, f"{parents}{name}.") for name, inner in content.items()
        }
    known = {key_of(parameter): parameter for parameter in _settable(command)}
    values = {}
    for name, value in content.items():
        key = str(name).replace("_", "-")
        if key not in known:
            raise GladError(f"{file}: unknown key '{parents}{name}'{did_you_mean(key, known)}")
        if value is not None:
            check(value, known[key], ctx, f"{file}: {parents}{name}")
            values[known[key].name] = value
    return values


def check(value: Any, parameter: Any, ctx: typer.Context, key: str) -> Any:
    """The value as the command gets it. Raises GladError, beginning with ``key``, unless click accepts it."""
    is_flag = getattr(parameter, "is_flag", False)
    if isinstance(value, list | dict) or isinstance(value, bool) != is_flag:
        raise GladError(f"{key}: '{value}' is not {'true or false' if is_flag else 'one value of the right kind'}")
    try:
        return parameter.process_value(ctx, value)
    except typer.BadParameter as error:
        raise GladError(f"{key}: '{value}': {error.message}") from error


def key_of(parameter: Any) -> str:
    """Name of a parameter in the file: the flag without dashes, or the argument's name."""
    flags = [name for name in parameter.opts if name.startswith("--")]
    return (flags[0].removeprefix("--") if flags else parameter.name).replace("_", "-")


def _settable(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.name != "help"]


def effective(ctx: typer.Context, words: list[str]) -> list[dict[str, Any]]:
    """The settings a command would run with: ``command``, ``setting``, ``value`` and ``from`` of every parameter.

    Args:
        words: a command and options for it, as they would follow `glad`; empty: every command.

    Raises:
        GladError: no such command, no such option of it, or a value that does not fit.
    """
    root = ctx.find_root()
    return _effective(root.command, root, words, [])


def _effective(command: Any, ctx: Any, words: list[str], names: list[str]) -> list[dict[str, Any]]:
    """Rows of one command or of a group's commands. ``names``: the command's own, as [bundle, create]."""
    groups = getattr(command, "commands", None)
    if groups is None:
        _check_words(command, ctx, words, " ".join(names))
        return [
            {
                "command": " ".join(names),
                "setting": key_of(parameter),
                "value": ctx.params[parameter.name],
                "from": origin(ctx, parameter.name),
            }
            for parameter in _settable(command)
        ]
    rows = []
    for name in words[:1] or sorted(groups):
        if name not in groups:
            raise GladError(f"no command '{' '.join([*names, name])}'{did_you_mean(name, groups)}")
        inner, rest = groups[name], words[1:]
        # A group would take the words that follow for its own, so it gets none of them.
        arguments = [] if hasattr(inner, "commands") else rest
        context = inner.make_context(name, [*arguments], parent=ctx, resilient_parsing=True)
        rows += _effective(inner, context, rest, [*names, name])
    return rows


def origin(ctx: Any, parameter: str) -> str:
    """Where a parameter of a command has its value from, a value of `ORIGINS`."""
    return ORIGINS[ctx.get_parameter_source(parameter).name]


def _check_words(command: Any, ctx: Any, words: list[str], name: str) -> None:
    """Raise GladError for options that do not fit; click ignores them while it may not fail for missing ones."""
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise GladError(f"{name}: no option {flag}{did_you_mean(flag, sorted(known))}")
    for parameter in _settable(command):
        if origin(ctx, parameter.name) != "default" and ctx.params[parameter.name] is None:
            raise GladError(f"{name}: the value of '{key_of(parameter)}' does not fit; see `glad {name} --help`")
