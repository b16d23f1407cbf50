"""The command line: options to configurations, results on stdout, progress and errors on stderr."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ..errors import CertiPatchError, ProcessError, one_line

app = typer.Typer(
    help="Train, certify and run image classifiers that no patch of a stated size can fool.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"certipatch {version('certipatch')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: every error of ours is one line and exit code 2."""
    try:
        app()
    except (CertiPatchError, OSError) as error:
        print(f"certipatch: {one_line(str(error))}", file=sys.stderr, flush=True)
        if isinstance(error, ProcessError):
            os._exit(2)  # threads that still talk to the process that is gone may abort an orderly exit
        sys.exit(2)


from . import masks, train, certify, detect, predict, attack, verify, report, reproduce, bench, demo  # noqa
