"""``certipatch attack``: look for patches that fool the defended model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import DataAsked, ModelAsked
from ..runtime.console import stdout
from . import options as ask
from .engine import check_engine, own_device, team_of
from .open import open_both, resumable
from .parse import check_out

if TYPE_CHECKING:
    from ..records.read import Folder


def attack(
    model: ask.Model,
    records: Annotated[
        Path, typer.Option(help="folder that certify wrote: its images, patch, k and precision")
    ],
    data: ask.Data,
    out: ask.Out,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    split: ask.Split = None,
    class_map: ask.ClassMap = None,
    image_size: ask.ImageSize = None,
    crop_pct: ask.CropPct = None,
    limit: ask.Limit = None,
    steps: Annotated[int, typer.Option(min=1, help="gradient steps in each round")] = 8,
    restarts: Annotated[int, typer.Option(min=1, help="starts for each image, while it is not broken")] = 62,
    certified_restarts: Annotated[
        int, typer.Option(min=1, help="starts for each certified image, which must all fail")
    ] = 2,
    seed: ask.Seed = 0,
    device: ask.Device = "auto",
    engine: ask.Engine = None,
    address: ask.Address = None,
    devices_per_node: ask.DevicesPerNode = None,
    resume: ask.Resume = False,
    as_json: ask.AsJson = False,
) -> None:
    """Attack the defended model with patches, on the images of a certification: an upper bound beside the
    proven lower one."""
    from ..certification.methods import ANSWERING
    from ..certification.restore import read_certification, restore
    from ..records.read import read_folder
    from ..redteam.attack import attack as attack_certified
    from ..redteam.climb import AttackConfig
    from ..runtime.devices import make_fabric

    check_out(out, data, str(records))
    check_engine(engine, address, devices_per_node)
    asked = ModelAsked(model, weights, pretrained, image_size, crop_pct)
    manifest = read_certification(records, ANSWERING)
    folder = read_folder(records, manifest)
    source, opened = open_both(asked, DataAsked(data, split, class_map), as_in=manifest)
    config = AttackConfig(steps=steps, restarts=restarts, certified_restarts=certified_restarts, seed=seed)
    with resumable(out):
        own, precision = own_device(engine, device), manifest.certification.precision
        fab = make_fabric(device=own, precision=precision)
        how: dict[str, Any] = {"fabric": fab, "config": config, "limit": limit, "resume": resume}
        with team_of(engine, address, devices_per_node, device) as team:
            defense = restore(manifest, opened, fab, plain=team is not None)
            how |= {"team": team, "restored": partial(restore, manifest)}
            attack_certified(opened, source, defense, folder, out, **how)
    _show(out, folder, as_json)


def _show(out: Path, certified: Folder[Any], as_json: bool) -> None:
    from ..records.read import read_folder
    from ..records.schema import ATTACKS
    from ..redteam.found import PICTURES
    from ..report.attack import attack_text, certification_of, summarize_attack

    attacked = read_folder(out)
    found = summarize_attack(attacked, certification_of(attacked, [certified]))
    if as_json:
        print(json.dumps(found))
        return
    stdout.print(attack_text(found), markup=False, soft_wrap=True)
    stdout.print(
        f"records: {out}/{ATTACKS}; the patched images: {out}/{PICTURES}", markup=False, soft_wrap=True
    )
