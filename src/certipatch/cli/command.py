"""What all commands share beside their options: groups in ``--help``, ``--config`` and the environment.

A value is taken from the command line, else from the environment variable ``CERTIPATCH_COMMAND_OPTION``, else
from the file of ``--config``, else it is the default. A run that took any from elsewhere than the command
line is recorded as if all had been typed, so that its manifest tells the whole command.
"""

from __future__ import annotations

import inspect
import os
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from ..errors import ConfigError, brief
from .help import GROUP_OF

PREFIX = "CERTIPATCH"
NOT_IN_A_FILE = ("config", "like", "help")


class Command(TyperCommand):
    """A command whose ``--help`` is in groups, and whose options may stand in the environment."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        for param in self.params:
            if isinstance(param, TyperOption):
                param.envvar = f"{PREFIX}_{name}_{typed_name(param)}".replace("-", "_").upper()
                param.show_envvar = False  # it would double the length of --help

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        start = f"{PREFIX}_{self.name}_".upper()
        known = [str(param.envvar) for param in self.params if isinstance(param, TyperOption)]
        for name in os.environ:
            if name.startswith(start):
                _refuse_unknown("environment: ", known, [name])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        sources = {ctx.get_parameter_source(param.name).name for param in self.params}
        if sources & {"ENVIRONMENT", "DEFAULT_MAP"}:
            sys.argv[1:] = [str(ctx.info_name), *_words(self, ctx)]
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        sections |= {group: [] for group in [*dict.fromkeys(GROUP_OF.values()), "Options"]}
        for param in self.get_params(ctx):
            group = GROUP_OF.get(str(param.name), "Options")
            record = param.get_help_record(ctx)
            if record is not None:
                sections["Arguments" if param.param_type_name == "argument" else group].append(record)
        for group, records in sections.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


def typed_name(param: Any) -> str:
    """An option's name as it is typed, without its dashes: ``masks-per-axis``, ``json``."""
    return str(param.opts[0]).lstrip("-")


def _words(command: TyperCommand, ctx: Any) -> list[str]:
    """Every value that is not a default, as it would be typed."""
    given = [
        param
        for param in command.params
        if param.name != "config" and ctx.get_parameter_source(param.name).name != "DEFAULT"
    ]
    given.sort(key=lambda param: param.param_type_name == "argument")  # behind the options
    return [word for param in given for word in _as_words(param, ctx.params[param.name])]


def _as_words(param: Any, value: Any) -> list[str]:
    if isinstance(value, bool):
        return list(param.opts[:1] if value else param.secondary_opts[:1])
    each = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
    name = [] if param.param_type_name == "argument" else param.opts[:1]
    return [word for one in each for word in (*name, one)]


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a TOML file as defaults: those above all tables, which other commands share, and
    those of the table ``[command]``.

    Raises ConfigError for a file that cannot be read, a table or key that no command has, and a key of its
    own table or a value that this command does not have.
    """
    if path is None:
        return None
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"config {path}: expected a file of TOML ({brief(error)})") from None
    ctx.default_map = _defaults(ctx, written, f"config {path}: ")
    return path


def _defaults(ctx: typer.Context, written: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a file that are for this command, by the names of its parameters."""
    tables = {key: value for key, value in written.items() if isinstance(value, dict)}
    shared = {_dashed(key): value for key, value in written.items() if key not in tables}
    below = {_dashed(key): value for key, value in tables.get(str(ctx.info_name), {}).items()}
    own = _options(ctx.command)
    commands = getattr(ctx.parent and ctx.parent.command, "commands", {})
    anywhere = dict(entry for command in commands.values() for entry in _options(command).items())
    for known, keys in ((own, below), (anywhere, shared), (commands, tables)):
        _refuse_unknown(where, known, keys)
    values = {key: value for key, value in {**shared, **below}.items() if key in own}
    return {str(own[key].name): _as_typed(f"{where}{key}", own[key], value) for key, value in values.items()}


def _refuse_unknown(where: str, known: Collection[str], keys: Iterable[str]) -> None:
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 1) or sorted(known)
            raise ConfigError(f"{where}expected {', '.join(near)}, found {key!r}")


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _options(command: Any) -> dict[str, Any]:
    """What may stand in a file, by its name there."""
    return {typed_name(param): param for param in command.params if param.name not in NOT_IN_A_FILE}


def _as_typed(where: str, param: Any, value: Any) -> Any:
    """A value of TOML as it would be typed: true and false for a flag, text for the rest."""
    several = bool(getattr(param, "multiple", False) or param.nargs != 1)
    is_flag = bool(getattr(param, "is_flag", False))
    entries = value if isinstance(value, list) and several else [value]
    wanted = bool if is_flag else (str, int, float)
    if not all(isinstance(one, wanted) and (is_flag or not isinstance(one, bool)) for one in entries):
        kind = "true or false" if is_flag else "text or a number"
        raise ConfigError(f"{where}: expected {kind}, found {brief(repr(value), 60)}")
    text = [str(one) for one in entries]
    return value if is_flag else text if several else text[0]


Config = Annotated[
    Path | None,
    typer.Option(
        callback=read_config, is_eager=True, help="TOML file of options: patch = '3%', epochs = 10 ..."
    ),
]


def configurable(command: Callable[..., None]) -> Callable[..., None]:
    """A command with ``--config``, which is read before the other options are."""

    @wraps(command)
    def run(*, config: Path | None = None, **options: Any) -> None:
        command(**options)

    own = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config)
    vars(run)["__signature__"] = own.replace(parameters=[*own.parameters.values(), option])
    run.__annotations__ = {**command.__annotations__, "config": Config}
    return run
