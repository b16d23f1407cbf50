"""``certipatch export``: the defended model as a graph that ONNX Runtime runs, certified again as such."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import DataAsked, ModelAsked
from ..errors import ConfigError
from ..runtime.console import stdout
from . import options as ask
from .open import open_data, resumable
from .parse import check_out
from .serve import about

if TYPE_CHECKING:
    from ..data.source import Source
    from ..deploy.export import Original
    from ..records.manifest import Manifest


def export(
    model: Annotated[str, typer.Argument(help="what was certified, as --model of certify")],
    certified: Annotated[Path, typer.Option(help="folder that certify wrote of this model")],
    out: ask.Out,
    data: Annotated[
        str | None, typer.Option(help="the images of --certified; without: no certificate")
    ] = None,
    split: ask.Split = None,
    class_map: ask.ClassMap = None,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    class_names: ask.ClassNames = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="views in each pass, from now on")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="of each pass, from now on")] = None,
    resume: ask.Resume = False,
) -> None:
    """Export the defended model for ONNX Runtime, with a certificate made with the export."""
    from ..deploy import export as work
    from ..deploy.graph import check_libraries

    check_out(out, data)
    check_libraries()
    work.check_folder(out, resume=resume)
    original = _original(certified, ModelAsked(model, weights, pretrained), class_names)
    source = _images(original, DataAsked(data, split, class_map)) if data else None
    with resumable(out):
        stated = work.write(original, out, views=batch_size, threads=threads)
        if source is not None:
            folder = work.certify(original, source, out, stated, data=str(data))
            stated["compared"] = work.compare(original, source, out, stated)
            stated["certificate"] = about(folder)
        work.finish(out, stated)
    _show(out, stated)


def _original(certified: Path, asked: ModelAsked, class_names: Path | None) -> Original:
    from ..certification.restore import open_certified, read_certification, restore
    from ..data.words import read_class_names
    from ..defenses.patchcleanser.defense import PatchCleanser
    from ..deploy.export import Original
    from ..records.read import read_records
    from ..runtime.devices import make_fabric

    manifest = read_certification(certified)
    if manifest.finished is None or len(read_records(certified)) < manifest.certification.data.images:
        raise ConfigError(f"certified {certified}: expected finished records; run certify --resume first")
    opened = open_certified(asked, manifest)
    fabric = make_fabric(device="cpu", precision=manifest.certification.precision)
    names = read_class_names(class_names) if class_names else None
    defense = restore(manifest, opened, fabric)
    assert isinstance(defense, PatchCleanser)  # as the manifest says
    return Original(manifest, opened, defense, names)


def _images(original: Original, asked: DataAsked) -> Source:
    from ..certification.restore import images_as_certified

    manifest: Manifest = original.manifest
    run = original.opened if original.opened.trained is not None else None
    return images_as_certified(manifest, open_data(asked, run, str(manifest.folder)))


def _show(out: Path, stated: dict[str, Any]) -> None:
    def say(text: str) -> None:
        stdout.print(text, markup=False, soft_wrap=True)

    found, compared = stated["exported"], stated["compared"]
    say(
        f"{out}: written by the exporter {found['exporter']}; logits within {found['apart']:.2g} of the "
        "model's"
    )
    if compared is None:
        say("certificate: none, for there was no --data; the model's certificates are not the export's")
    else:
        for what in ("answers_differ", "undefended_answers_differ", "certificates_lost", "certificates_won"):
            names = compared[what]
            shown = f" ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''})" if names else ""
            say(f"{what.replace('_', ' ')}: {len(names)} of {compared['images']}{shown}")
        change = compared["largest_change_of_a_margin"]
        say(f"margins of certificates moved by at most {change:.2g} logits")
        share = stated["certificate"]["certified_robust_accuracy"]
        say(f"certified with the export: {share['count']} of {share['images']}")
    say(f"next: python {out}/runner.py --prove photo.jpg")
