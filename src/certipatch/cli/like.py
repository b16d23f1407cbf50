"""``certipatch train --like RUN``: the file for ``--config`` that trains as a run was trained."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecordsError
from ..records.manifest import Manifest, read_manifest

# What a training's experiment does not hold: where things were, and on what it ran.
PLACES = ["model", "weights", "pretrained", "data", "split", "val_data", "val_split", "class_map", "limit"]
MACHINE = ["precision", "device", "devices", "nodes", "workers"]


def print_like(ctx: typer.Context, run: Path | None) -> Path | None:
    """Print the options of a training run as TOML, and end the command.

    Raises RecordsError for a folder that train did not write.
    """
    if run is None:
        return None
    manifest = read_manifest(run)
    if manifest.kind != "train":
        raise RecordsError(f"like {run}: expected a run of train, found a folder of {manifest.kind}")
    typed = _typed(ctx, manifest)
    values = {name: typed[name] for name in (*PLACES, *MACHINE) if name in typed}
    values = {"model": manifest.stated["model"]["arch"], "data": manifest.data, **values, **_recipe(manifest)}
    if values["model"] == manifest.stated["model"]["arch"]:  # another run has its own
        values |= {key: manifest.stated["model"][key] for key in ("image_size", "crop_pct")}
    print(f"# As {run} was trained; certipatch train --config FILE --out ANOTHER")
    for name, value in values.items():
        text = "x".join(map(str, value)) if isinstance(value, list) else value  # height x width
        if text not in (None, ""):
            print(f"{name.replace('_', '-')} = {json.dumps(text, ensure_ascii=False)}")
    raise typer.Exit


def _recipe(manifest: Manifest) -> dict[str, Any]:
    """What decides on the weights, as the experiment states it."""
    stated = manifest.stated["train"]
    names = ["strategy", "masks_per_axis", "epochs", "batch_size", "lr", "optimizer", "schedule"]
    names += [
        "weight_decay",
        "momentum",
        "augment",
        "ema",
        "keep",
        "clean_fraction",
        "gradcam_layer",
        "compile_step",
    ]
    return {
        "patch": stated["patch_size"],
        **{
            name: stated.get(name)
            for name in (*names, "search_every", "search_precision", "windows", "loss", "seed")
        },
    }


def _typed(ctx: typer.Context, manifest: Manifest) -> dict[str, Any]:
    """The options that were typed, as far as the command is one of ``train``."""
    try:
        program, command, *words = shlex.split(manifest.command)
    except ValueError:
        return {}
    if (program, command) != ("certipatch", ctx.info_name):
        return {}
    parser: Any = ctx.command
    with parser.make_context(ctx.info_name, words, resilient_parsing=True) as found:
        typed: dict[str, Any] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in found.params.items()
            if found.get_parameter_source(name).name == "COMMANDLINE"
        }
    return typed


Like = Annotated[
    Path | None,
    typer.Option(
        callback=print_like, is_eager=True, help="print the file for --config that trains as this run was"
    ),
]
