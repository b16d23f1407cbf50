"""The command line: which commands there are, and what becomes of an error.

A command is a file of this folder, with a function whose signature is its options and whose docstring is its
``--help``. What needs torch is imported inside the functions, so that ``--help`` is quick.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from ..errors import LIBRARIES, CertiPatchError, ConfigError, ProcessError, exit_code, one_line
from ..runtime.progress import sign_of_life
from .attack import attack
from .bench import bench
from .certify import certify
from .checks import checks
from .command import Command, configurable
from .demo import demo
from .detect import detect
from .export import export
from .help import epilog
from .masks import masks
from .predict import predict
from .push import push
from .report import report
from .reproduce import reproduce
from .serve import serve
from .train import train
from .verify import verify

COMMANDS = (
    masks,
    train,
    certify,
    detect,
    predict,
    export,
    push,
    serve,
    attack,
    verify,
    report,
    reproduce,
    bench,
    demo,
    checks,
)

app = typer.Typer(
    help="Train, certify and run image classifiers that no patch of a stated size can fool.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command(cls=Command, epilog=epilog(command.__name__))(configurable(command))


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"certipatch {version('certipatch')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """The options of ``certipatch`` itself; this text is not shown."""


def _check_words(words: list[str]) -> None:
    """Raise ConfigError for a word that is not UTF-8: it would be written into a manifest."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"command line: expected names in UTF-8, found {os.fsencode(word)!r}; rename it, or set "
                "LC_ALL=C.UTF-8 where the locale is another"
            ) from None


def main() -> None:
    """Run the command line. Every error of ours is one line on standard error; docs/cli.md lists the exit
    codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_words(sys.argv[1:])
        with sign_of_life(sys.argv[1] if len(sys.argv) > 1 else "certipatch"):
            code = app(prog_name="certipatch", standalone_mode=False)
    except typer.Abort:
        code = 130
    except typer.TyperException as error:
        code = _usage(error)
    except (CertiPatchError, OSError, MemoryError, RuntimeError, ImportError) as error:
        code = _failed(error)
    sys.exit(code)


def _failed(error: Exception) -> int:
    """Say in one line what is wrong; a mistake of ours is raised again."""
    code = exit_code(error)
    if code is None:
        raise error
    said = one_line(str(error)) or "out of memory"
    if isinstance(error, ModuleNotFoundError):
        said += "; pip install certipatch installs it (records, report and masks do without torch)"
    elif isinstance(error, ImportError) or LIBRARIES in said:
        said += (
            "; install torch and torchvision of the same release, such as pip install -U torch torchvision"
        )
    print(f"certipatch: {said}", file=sys.stderr, flush=True)
    if isinstance(error, ProcessError):
        os._exit(code)  # threads that still talk to the process that is gone may abort an orderly exit
    return code


def _usage(error: typer.TyperException) -> int:
    """Say in one line what was mistyped; without any word, the commands."""
    context = getattr(error, "ctx", None)
    if context is not None and len(sys.argv) == 1:
        print(context.get_help())
        return 2
    said = " ".join(error.format_message().split()).rstrip(".")
    path = context.command_path if context is not None else "certipatch"
    print(f"{path}: {one_line(said[:1].lower() + said[1:])}; see {path} --help", file=sys.stderr)
    return 2
