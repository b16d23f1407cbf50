"""From what was asked for to what it names: images, models and folders of records, each opened once.

What needs torch is imported where it is used, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..config import DataAsked, ModelAsked, ModelSpec
from ..errors import ConfigError, DataError, one_line
from ..geometry.patch import Size
from ..runtime.console import stderr
from ..runtime.signals import SIGNALS, stopped_by
from .parse import parse_size

if TYPE_CHECKING:
    from ..data.source import Source
    from ..deploy.deployed import Deployed
    from ..models.runs import Opened
    from ..records.manifest import Manifest


def open_both(
    model: ModelAsked,
    data: DataAsked,
    *,
    limit: int | None = None,
    as_in: Manifest | None = None,
    every_class: bool = False,
) -> tuple[Source, Opened]:
    """The images to judge a model on, and the model.

    A training run brings its classes to the images, the images bring theirs to any other model. All of them
    do, also those that a limit leaves out: what is certified does not depend on which are left.

    Args:
        limit: only this many images, spread over all. as_in: only those that this certification is of.
        every_class: refuse images without any of a class that a training run knows.
    """
    run = open_run_asked(model) if is_run(model.name) else None
    source = open_data(data, run, model.name)
    if run is None and data.class_map is None:
        _refuse_doubtful_order(data.place, source.classes)
    if run is not None and every_class:
        source.refuse_missing_classes(f"data {data.place}")
    opened = run or build_asked(model, source)
    if as_in is not None:
        from ..certification.restore import images_as_certified

        return images_as_certified(as_in, source), opened
    return source.first(limit), opened


def _refuse_doubtful_order(place: str, classes: tuple[str, ...]) -> None:
    """Raises DataError for class folders that others number otherwise than timm, if they decide what the
    outputs of a network mean that was trained elsewhere."""
    from ..data.load import has_name
    from ..data.names import in_order

    by_code_point = tuple(sorted(classes))
    ties = [pair for pair in pairwise(classes) if in_order(pair[0])[0] == in_order(pair[1])[0]]
    if has_name(place) or (by_code_point == classes and not ties):
        return
    if ties:
        why = f"timm takes {ties[0][0]} and {ties[0][1]} for equal and numbers them by chance"
    else:
        first = next(i for i, name in enumerate(classes) if name != by_code_point[i])
        torchvision, timm = (_around(names, first) for names in (by_code_point, classes))
        why = f"torchvision sorts by code point ({torchvision}), timm naturally and without case ({timm})"
    raise DataError(
        f"data {place}: the order of the classes in the weights is not known: {why}; give --class-map FILE "
        "with one class folder a line, in the order of the network's outputs"
    )


def _around(names: tuple[str, ...], place: int) -> str:
    """The names from one before a place to two behind it."""
    start, end = max(place - 1, 0), place + 3
    return f"{'... ' * (start > 0)}{', '.join(names[start:end])}{' ...' * (len(names) > end)}"


def open_data(data: DataAsked, run: Opened | None = None, name: str = "") -> Source:
    """The images to judge a model on, with labels as the model means them: a run brings its class names.

    ``name`` is what the run is called in an error.
    """
    from ..data.load import judged_split, load_source

    classes = run.spec.classes if run else None
    split = judged_split(data.place, data.split)
    source = load_source(data.place, split=split, class_map=data.class_map, classes=classes)
    if classes is not None and source.classes != classes:
        raise DataError(
            f"data {data.place}: expected the classes of {name} ({', '.join(classes[:5])} ...), found "
            f"{', '.join(source.classes[:5])} ..."
        )
    remark(source)
    return source


def remark(source: Source) -> None:
    """Say what lies among the images and was left out, or is there twice."""
    for line in source.remarks:
        stderr.print(one_line(line), markup=False, soft_wrap=True)


def open_run_asked(model: ModelAsked, *, classes: tuple[str, ...] | None = None) -> Opened:
    """The training run that ``--model`` names; it has its own weights and size, so nothing else may be asked
    for.

    Raises DataError if it tells other classes apart than ``classes``, where those are given.
    """
    from ..models.runs import open_run, run_folder

    if not model.bare:
        raise ConfigError(
            f"model {model.name}: a training run has its own weights and size; drop --weights, --pretrained, "
            "--image-size and --crop-pct"
        )
    return open_run(run_folder(model.name) or Path(model.name), classes=classes)


def open_deployed(model: ModelAsked, device: str) -> Deployed | None:
    """The exported predictor that ``--model`` names; None for another kind of model.

    Raises ConfigError for what an export does not take, and errors of a folder that is damaged.
    """
    from ..deploy.deployed import Deployed

    if not is_export(model):
        return None
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device {device!r}: an export runs, and is certified, on the CPU; drop --device")
    return Deployed.open(Path(model.name))


def is_export(model: ModelAsked) -> bool:
    """Whether ``--model`` names a folder that ``export`` wrote. Raises ConfigError for what it does not
    take."""
    from ..deploy.deployed import is_deployed

    if not is_deployed(Path(model.name)):
        return False
    if not model.bare:
        raise ConfigError(
            f"model {model.name}: an export has its own weights and size; drop --weights, --pretrained, "
            "--image-size and --crop-pct"
        )
    return True


def open_to_train(model: ModelAsked, source: Source, *, seed: int) -> Opened:
    """The model that a training starts from: a run, or an architecture with the weights asked for or random
    ones."""
    if is_run(model.name):
        return open_run_asked(model, classes=source.classes)
    return build_asked(model, source, training=True, seed=seed)


def build_asked(model: ModelAsked, source: Source, *, training: bool = False, seed: int = 0) -> Opened:
    """The architecture, function or folder that ``--model`` names, for the classes of the images."""
    from ..models.build import build
    from ..models.runs import Opened

    spec, weights = _described(model, source.classes, training=training)
    if _smaller(source, spec.image_size):
        spec = _enlarging(spec, model.crop_pct)
    network = build(spec, pretrained=model.pretrained, weights=weights, replace_head=training, seed=seed)
    return Opened.of(spec, network)


def _described(
    model: ModelAsked, classes: tuple[str, ...], *, training: bool
) -> tuple[ModelSpec, str | None]:
    """What ``--model`` names as the model states it, and the file of weights that was asked for or found."""
    from ..models.build import describe
    from ..models.hub import describe_folder, folder_of, is_address
    from ..models.named import describe_module, is_function, module_of

    size = parse_size(model.image_size) if model.image_size else None
    asked: dict[str, Any] = {"classes": classes, "image_size": size, "crop_pct": model.crop_pct}
    if is_function(model.name):
        return describe_module(module_of(model.name), model.name, **asked), model.weights
    if is_address(model.name):
        if model.has_weights:
            raise ConfigError(f"model {model.name}: has its own weights; drop --weights and --pretrained")
        return describe_folder(folder_of(model.name), **asked)
    if not training and not model.has_weights:
        raise ConfigError(
            f"model {model.name}: expected a training run, or --weights or --pretrained with a timm name; "
            "random weights certify nothing"
        )
    return describe(model.name, num_classes=len(classes), **asked), model.weights


def _enlarging(spec: ModelSpec, crop_pct: float | None) -> ModelSpec:
    """The spec for images that are smaller than the model's input: resized bicubic, without a crop unless
    asked for."""
    enlarged = spec.model_copy(update={"interpolation": "bicubic", "crop_pct": crop_pct or 1.0})
    if enlarged != spec:
        crop = "without a crop" if enlarged.crop_pct == 1 else f"with crop_pct {enlarged.crop_pct:g}"
        stderr.print(
            f"images are smaller than the model's input: resized bicubic {crop} (--crop-pct sets it)",
            markup=False,
        )
    return enlarged


def _smaller(source: Source, size: Size) -> bool:
    """Whether all of some images, spread over the set, are smaller than the model's input."""
    from ..data.decode import UNREADABLE, decode

    some, smaller = source.first(10), []
    for i in range(len(some)):
        try:
            width, height = decode(some.open(i)).size  # upright
        except UNREADABLE:
            continue
        smaller.append(height < size[0] or width < size[1])
    return bool(smaller) and all(smaller)


def is_run(model: str) -> bool:
    """Whether ``--model`` names a training run. Raises ConfigError for a path where there is no folder."""
    from ..models.runs import run_folder

    _refuse_address(model)
    return run_folder(model) is not None


def _refuse_address(model: str) -> None:
    """Raises ConfigError for a hub's address in other words than ours, and says what to type."""
    address = re.fullmatch(r"(hf[-_]hub:|https?://huggingface\.co/)([^@]+)(@.*)?", model, re.IGNORECASE)
    if address is not None and address[1] != "hf-hub:" and not os.path.exists(model):
        raise ConfigError(
            f"model {model}: expected an address such as hf-hub:user/name; type --model hf-hub:{address[2]}"
        )


def place_of(folder: Path) -> Path:
    """A folder of records; of ``hf-hub:user/name@revision/certificates/...`` the one that is fetched."""
    from ..models.hub import HUB, folder_of

    text = str(folder)
    if not text.startswith(HUB):
        return folder
    address = text.removeprefix(HUB).split("/")
    return folder_of(HUB + "/".join(address[:2])).joinpath(*address[2:])


def folders_of_records(folder: Path) -> list[Path]:
    """The folder, or those in it that certify has written for several patches or k; of one for the hub its
    certificates."""
    from ..records.manifest import folders_inside

    certificates = folder / "certificates"
    return folders_inside(certificates if certificates.is_dir() else folder) or [folder]


@contextmanager
def resumable(out: Path, advice: str = "run the same command with --resume") -> Iterator[None]:
    """A block that may be interrupted, by Ctrl-C or a scheduler: then a line says what is kept and how to go
    on, and the exit code is 130."""
    try:
        with stopped_by(*SIGNALS):
            yield
    except KeyboardInterrupt:
        print(f"interrupted; what is done is kept in {out}: {advice}", file=sys.stderr)
        raise typer.Exit(130) from None
