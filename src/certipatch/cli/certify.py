"""``certipatch certify``: prove for each image that no patch changes the answer."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DataAsked, ModelAsked
from ..errors import ConfigError
from ..runtime.console import print_table, stdout
from . import options as ask
from .engine import check_engine, own_device, team_of
from .jobs import SubmitAsked, jobs_asked
from .open import open_both, resumable
from .parse import check_out, geometries, parse_devices, parse_inference, parse_shard

if TYPE_CHECKING:
    from ..report.certification import Summary


def certify(
    model: ask.Model,
    data: ask.Data,
    patch: ask.PatchesToCertify,
    out: ask.OutEach,
    masks_per_axis: ask.SeveralMasksPerAxis = None,
    patches: ask.Patches = 1,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    split: ask.Split = None,
    class_map: ask.ClassMap = None,
    image_size: ask.ImageSize = None,
    crop_pct: ask.CropPct = None,
    batch_size: ask.BatchSize = None,
    limit: ask.Limit = None,
    device: ask.Device = "auto",
    precision: ask.Precision = "32-true",
    devices: ask.Devices = "1",
    nodes: ask.Nodes = 1,
    exhaustive: ask.Exhaustive = False,
    inference: ask.Inference = None,
    places: ask.ByPlace = False,
    prove: ask.ProveToo = False,
    compile: ask.Compile = None,
    shared_prefix: ask.SharedPrefix = None,
    defense: ask.Defense = "patchcleanser",
    windows: ask.WindowsShown = None,
    theta: ask.Theta = None,
    tokens: ask.TokensShown = None,
    engine: ask.Engine = None,
    address: ask.Address = None,
    devices_per_node: ask.DevicesPerNode = None,
    shard: ask.Shard = "1/1",
    submit: ask.Submit = None,
    partition: ask.Partition = None,
    gpus: ask.Gpus = None,
    time: ask.Time = None,
    resume: ask.Resume = False,
    as_json: ask.AsJson = False,
) -> None:
    """Certify a model on labelled images, one record each."""
    check_out(out, data)
    if jobs_asked(SubmitAsked(submit, partition, gpus, time), out):
        return
    asked = CertificationAsked(
        model=ModelAsked(model, weights, pretrained, image_size, crop_pct),
        data=DataAsked(data, split, class_map),
        limit=limit,
        geometry=(patch, _masks_per_axis(defense, masks_per_axis), patches),
        out=out,
        machine={"device": device, "precision": precision, "devices": parse_devices(devices), "nodes": nodes},
        engine=(engine, address, devices_per_node),
        way={"batch_size": batch_size, "compile": compile, "shared_prefix": shared_prefix},
        defense=defense,
        options=_options(defense, exhaustive, inference, places, prove, windows, theta, tokens),
        resume=resume,
    )
    written = run(asked, parse_shard(shard))
    if written is not None:
        _show(written, out, as_json)


@dataclass(frozen=True)
class CertificationAsked:
    """What ``certify`` or ``detect`` was asked for.

    Attributes:
        geometry: ``--patch``, ``--masks-per-axis`` (None: without masks) and ``--patches``.
        machine, way: arguments of ``make_fabric`` and of ``WayAsked``. engine: those of ``team_of``.
        defense, options: a certified defense by name, and its own options.
    """

    model: ModelAsked
    data: DataAsked
    limit: int | None
    geometry: tuple[str, str | None, int]
    out: Path
    machine: dict[str, Any]
    engine: tuple[str | None, str | None, int | None]
    way: dict[str, Any]
    defense: str
    options: dict[str, Any]
    resume: bool


@dataclass(frozen=True)
class Written:
    """The folders of a certification, one for each patch and k, and which part of the images this process
    did."""

    folders: list[Path]
    shard: tuple[int, int]
    images: int


def run(asked: CertificationAsked, part: tuple[int, int] = (1, 1)) -> Written | None:
    """Certify for each patch and k; None on a process that has nothing to say."""
    from ..certification.certify import certify_sizes
    from ..certification.work import WayAsked
    from ..runtime.devices import make_fabric
    from ..runtime.processes import alone, in_turn, launched, together

    _check_machine(asked)
    device = asked.machine["device"]
    # Processes that certify meet at the end only: who is first must not give up on the others.
    machine = {**asked.machine, "device": own_device(asked.engine[0], device), "patience": timedelta(days=30)}
    fab = make_fabric(**machine)
    with resumable(asked.out), launched(fab), team_of(*asked.engine, device) as team:
        source, opened = in_turn(
            fab, lambda: open_both(asked.model, asked.data, limit=asked.limit, every_class=True)
        )
        patch, masks_per_axis, patches = asked.geometry
        folders = geometries(patch, masks_per_axis, opened.spec.image_size, asked.out, patches)
        # Each process is a shard: together they need to agree on nothing but the end.
        mine = (part[0] - 1) * fab.world_size + fab.global_rank + 1, part[1] * fab.world_size
        how: dict[str, Any] = {
            "defense": asked.defense,
            "data": asked.data.place,
            "way": WayAsked(**asked.way),
            "team": team,
            "shard": mine,
            "resume": asked.resume,
            **asked.options,
        }
        with together(fab):
            certify_sizes(opened, source, folders, fabric=alone(fab), **how)
    return Written(list(folders), mine, len(source)) if fab.is_global_zero else None


def _check_machine(asked: CertificationAsked) -> None:
    """Raises ConfigError for an engine beside processes of this command."""
    check_engine(*asked.engine)
    if asked.engine[0] is not None and (asked.machine.get("devices", 1), asked.machine.get("nodes", 1)) != (
        1,
        1,
    ):
        raise ConfigError("--devices and --nodes: start processes without an engine; drop them or --engine")


def _masks_per_axis(defense: str, asked: str | None) -> str | None:
    """k as it is typed; None for a defense that has no masks. Raises ConfigError if that was given one."""
    from ..certification.methods import method_of

    if method_of(defense).masks:
        return asked or "6"
    if asked is not None:
        raise ConfigError(f"defense {defense!r}: has no masks; drop --masks-per-axis")
    return None


OPTIONS = ("exhaustive", "inference", "places", "prove", "windows", "theta", "tokens")


def _options(defense: str, *values: Any) -> dict[str, Any]:
    """The defense's own options, of those that were given: the values of ``OPTIONS``, in their order."""
    from ..certification.methods import check_options

    given = check_options(defense, dict(zip(OPTIONS, values, strict=True)))
    if "theta" in given and not 0 <= given["theta"] <= 1:  # NaN is not either
        raise ConfigError(f"theta {given['theta']:g}: expected a confidence from 0 to 1")
    return {**given, **({"inference": parse_inference(given["inference"])} if "inference" in given else {})}


def _show(written: Written, out: Path, as_json: bool) -> None:
    from ..records.read import has_records, read_folder
    from ..records.schema import RECORDS
    from ..report.certification import summarize, table

    begun = [folder for folder in written.folders if has_records(folder)]  # a shard may have no image
    summaries = [summarize(read_folder(folder)) for folder in begun]
    if as_json:
        found = [summary.to_json() for summary in summaries]
        print(json.dumps(found[0] if len(written.folders) == len(found) == 1 else found))
        return
    if summaries:
        print_table(table(summaries))
    _note_what_is_missing(written, summaries)
    say = partial(stdout.print, markup=False, soft_wrap=True)
    lines = RECORDS.replace(".", "*.") if written.shard[1] > 1 else RECORDS
    for folder in written.folders:
        say(f"records: {folder}/{lines}")
    if len(summaries) == len(written.folders) and all(summary.complete for summary in summaries):
        say(f"next: {shlex.join(['certipatch', 'report', str(out), '--html', f'{out}.html'])}")


def _note_what_is_missing(written: Written, summaries: list[Summary]) -> None:
    from ..records.store import BLOCK

    number, shards = written.shard
    if shards > 1 and (number - 1) * BLOCK >= written.images:
        stdout.print(f"shard {number}/{shards} holds no images: they are dealt in blocks of {BLOCK}")
    unreadable = summaries[0].unreadable if summaries else 0
    if unreadable:
        stdout.print(
            f"{unreadable} unreadable images count as not certified; they are named in the records",
            markup=False,
        )
