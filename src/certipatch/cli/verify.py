"""``certipatch verify``: check a folder of records with code that shares nothing with what wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import DataAsked, ModelAsked
from ..errors import ConfigError
from ..runtime.console import stdout
from . import options as ask
from .engine import check_engine, own_device, team_of
from .open import folders_of_records, is_export, is_run, open_both, open_data, open_run_asked, place_of

if TYPE_CHECKING:
    from ..data.source import Source
    from ..models.runs import Opened
    from ..verify.findings import Verification


def verify(
    certified: Annotated[Path, typer.Argument(help="folder that certify, detect or attack wrote")],
    model: ask.ModelToCompare = None,
    data: ask.DataToCompare = None,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    split: ask.Split = None,
    class_map: ask.ClassMap = None,
    image_size: ask.ImageSize = None,
    crop_pct: ask.CropPct = None,
    sample: Annotated[int, typer.Option(min=0, help="images to look at again, one view at a time")] = 20,
    every: Annotated[bool, typer.Option("--all", help="look at all images again")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="which images are drawn")] = 0,
    records: Annotated[
        Path | None, typer.Option(help="of an attack: the folder that certify wrote which it is on")
    ] = None,
    device: ask.Device = "auto",
    engine: ask.Engine = None,
    address: ask.Address = None,
    devices_per_node: ask.DevicesPerNode = None,
    as_json: ask.AsJson = False,
) -> None:
    """Check records with independent code: hashes, masks, flags, and images looked at again. Exit code 1 if
    anything is wrong or could not be confirmed."""
    from ..deploy.bundle import runner
    from ..verify.card import check_card
    from ..verify.check import verify as check
    from ..verify.export import check_export

    check_engine(engine, address, devices_per_node)
    source, given = _given(
        _model(model, weights, pretrained, image_size, crop_pct),
        DataAsked(data, split, class_map) if data else None,
    )
    certified = place_of(certified)
    how: dict[str, Any] = {"model": given, "source": source, "certification": records}
    how |= {"sample": None if every else sample, "seed": seed, "device": own_device(engine, device)}
    again = engine if given is not None and source is not None else None
    with team_of(again, *((address, devices_per_node) if again else (None, None)), device) as team:
        found = [check(folder, **how, team=team) for folder in folders_of_records(certified)]
    if found:
        found[0].findings[:0] = [*check_export(certified, runner()), *check_card(certified, found)]
    _show(found, as_json, again=given is not None and source is not None)
    if not all(one.confirmed for one in found):
        raise typer.Exit(1)


def _model(
    name: str | None, weights: str | None, pretrained: bool, image_size: str | None, crop_pct: float | None
) -> ModelAsked | None:
    """The model to compare with, if one was named."""
    asked = ModelAsked(name or "", weights, pretrained, image_size, crop_pct)
    if name is None and not asked.bare:
        raise ConfigError("--weights, --pretrained, --image-size and --crop-pct: expected --model with them")
    return asked if name else None


def _show(found: list[Verification], as_json: bool, *, again: bool) -> None:
    if as_json:
        print(json.dumps([one.to_json() for one in found]))
        return
    for one in found:
        stdout.print(one.text(again=again), markup=False, soft_wrap=True)


def _given(model: ModelAsked | None, data: DataAsked | None) -> tuple[Source | None, Opened | None]:
    """The images and the model to compare with, as far as they were named."""
    if model is None:
        return (open_data(data) if data else None), None
    if is_export(model):
        from ..deploy.again import open_again

        export = open_again(Path(model.name))
        return (open_data(data, export, model.name) if data else None), export
    if data is not None:
        return open_both(model, data)
    if is_run(model.name):
        return None, open_run_asked(model)
    raise ConfigError(f"model {model.name}: expected --data with it, whose classes it is built for")
