"""``certipatch serve``: the defended model as a service, with a page for people."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import ModelAsked
from ..errors import ConfigError, MachineError
from ..runtime.console import stdout
from . import options as ask
from .open import open_deployed, place_of
from .predict import as_certified

if TYPE_CHECKING:
    from ..deploy.service import Answering

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PATENTS = "Two patents bear on these methods: US 12,400,006 B2 and US 12,236,695 B2 (see the README)."


def serve(
    model: ask.Model,
    certified: Annotated[
        Path | None, typer.Option(help="folder that certify wrote of this model; an export has its own")
    ] = None,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    host: Annotated[str, typer.Option(help="address to listen on; the default: this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    prove: Annotated[bool, typer.Option("--prove/--no-prove", help="answer /prove")] = True,
    max_bytes: Annotated[int, typer.Option(min=1, help="largest image file that is taken")] = 20_000_000,
    queue: Annotated[int, typer.Option(min=1, help="images that wait at most; more get status 429")] = 8,
    device: ask.Device = "auto",
) -> None:
    """Answer over HTTP with the model as it was certified: /predict, /prove, /about, /health and a page."""
    service = _library()
    with service.bind(host, port) as listening:
        answering, known = _answering(certified, ModelAsked(model, weights, pretrained), device)
        limits = service.Limits(bytes=max_bytes, queue=queue, prove=prove)
        hosts = {*LOOPBACK, "[::1]"} if host in LOOPBACK else None
        app = service.service(answering, known, limits, hosts)
        stdout.print(f"http://{host}:{listening.getsockname()[1]}", markup=False, soft_wrap=True)
        sys.stdout.flush()
        service.run(app, listening)


def _library() -> Any:
    try:
        return import_module("..deploy.service", __package__)
    except ImportError as error:
        raise MachineError(
            f"serve: expected the extra serve, found no {error.name}; pip install 'certipatch[serve]'"
        ) from error


def _answering(certified: Path | None, asked: ModelAsked, device: str) -> tuple[Answering, dict[str, Any]]:
    """The model that answers, an export or as it was certified, and what the records say of it."""
    if deployed := open_deployed(asked, device):
        if certified is not None:
            raise ConfigError(f"model {asked.name}: an export has its own certificate; drop --certified")
        return deployed, {}
    if certified is None:
        raise ConfigError(f"model {asked.name}: expected --certified FOLDER with it, or a folder of export")
    from ..defenses.patchcleanser.defense import PatchCleanser
    from ..deploy.predictor import Predictor

    opened, defense, least = as_certified(certified, asked, device)
    assert isinstance(defense, PatchCleanser)  # as the manifest says
    return Predictor.of(opened.spec, defense, least), about(certified)


def about(certified: Path) -> dict[str, Any]:
    """What the records say of the model: the shares, and the hashes of what they are of."""
    from ..records.read import read_folder
    from ..report.certification import summarize

    folder = read_folder(place_of(certified))
    summary = summarize(folder)
    shares = ("vanilla_accuracy", "clean_accuracy", "certified_robust_accuracy")
    return {
        **{name: getattr(summary, name).to_json() for name in shares},
        **({"proven_answers": summary.proofs.to_json()} if summary.proofs else {}),
        "complete": summary.complete,
        "data": folder.manifest.data,
        "weights_sha256": summary.experiment.weights_sha256,
        "records_sha256": folder.manifest.line_hashes,
        "patents": PATENTS,
    }
