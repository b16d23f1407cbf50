"""``certipatch.certify``: a model and images from Python, certified into a folder in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import nn

from ..data.load import load_source
from ..data.source import Source
from ..errors import ConfigError, DataError
from ..geometry.masks import MaskSet
from ..geometry.patch import parse_patches
from ..models.named import check_outputs, describe_module, whole
from ..models.runs import Opened, open_run, run_folder
from ..records.read import read_records
from ..records.schema import PatchCleanserRecord
from ..runtime.devices import make_fabric
from .certify import certify as certify_source
from .work import WayAsked


class Pictures(Protocol):
    """A data set in memory, as those of torchvision without a transform: pictures and labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


def certify(
    model: nn.Module | str | Path,
    data: str | Path | Pictures,
    out: str | Path,
    *,
    patch: str = "3%",
    masks_per_axis: int = 6,
    patches: int = 1,
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    device: str = "auto",
    precision: str = "32-true",
    batch_size: int | None = None,
    compile: bool | None = None,
    resume: bool = False,
    **options: Any,
) -> list[PatchCleanserRecord]:
    """Certify a model on labelled images, and write sealed records that ``report``, ``verify``, ``attack``,
    ``predict`` and :func:`certipatch.load_defense` take.

    Args:
        model: a module from (N, 3, H, W) floats in [0, 1] to (N, classes) logits, its normalisation inside
            as a layer named ``Normalize``, in evaluation mode when it is used; or the folder of a training
            run. ``model.preprocessing`` may say how a file becomes an image (docs/own-model.md).
        data: as ``--data`` says it; or a data set of pictures (PIL) and labels, with ``classes`` (names).
        out: folder to write.
        patch, masks_per_axis, patches: as ``--patch`` ("3%", "39", "39x20+20x39"), k, 1 or 2.
        image_size: height and width in pixels that the model sees; default: as the model states it.
        limit: only so many images, spread over all.
        options: of :class:`certipatch.PatchCleanser`: ``inference``, ``places``, ``prove``, ``exhaustive``.

    Returns:
        One record an image, in order.

    Raises:
        CertiPatchError: whatever cannot be used, in one line, before the work.
    """
    opened, source = _opened(model, data, image_size)
    first, *others = parse_patches(patch, opened.spec.image_size)
    masks = MaskSet.covering(
        image_size=opened.spec.image_size,
        patch_size=first,
        other_patch_sizes=others,
        masks_per_axis=masks_per_axis,
        patches=patches,
    )
    certify_source(
        opened,
        source.first(limit),
        masks,
        Path(out),
        fabric=make_fabric(device=device, precision=precision),
        data=str(data) if isinstance(data, str | Path) else type(data).__name__,
        way=WayAsked(batch_size=batch_size, compile=compile),
        resume=resume,
        **options,
    )
    return read_records(Path(out))


def _opened(
    model: nn.Module | str | Path, data: str | Path | Pictures, image_size: int | tuple[int, int] | None
) -> tuple[Opened, Source]:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(model, nn.Module):
        folder = run_folder(str(model))
        if folder is None or size is not None:
            raise ConfigError(f"model {model}: expected a module or a training run, without an image_size")
        run = open_run(folder)
        return run, _source(data, run.spec.classes)
    source = _source(data, None)
    name = f"{type(model).__module__}:{type(model).__qualname__}"
    spec = describe_module(model, name, classes=source.classes, image_size=size)
    network = whole(model)
    check_outputs(network, spec)
    return Opened.of(spec, network), source


def _source(data: str | Path | Pictures, classes: tuple[str, ...] | None) -> Source:
    if isinstance(data, str | Path):
        return load_source(str(data), classes=classes)
    labels = [
        int(label) for label in getattr(data, "targets", None) or (data[i][1] for i in range(len(data)))
    ]
    names = classes or tuple(map(str, getattr(data, "classes", ()) or range(max(labels, default=0) + 1)))
    if not labels or min(labels) < 0 or max(labels) >= len(names):
        raise DataError(
            f"data {type(data).__name__}: expected labels of {len(names)} classes, found others or none"
        )
    return Source(names, _names(data, len(labels)), labels, lambda i: _picture(data, i))


def _names(data: Any, images: int) -> Sequence[str]:
    """The files of torchvision's folders by their last two parts; else numbers."""
    samples = getattr(data, "samples", None)
    if isinstance(samples, list) and len(samples) == images:
        return ["/".join(Path(str(sample[0])).parts[-2:]) for sample in samples]
    return [str(i) for i in range(images)]


def _picture(data: Pictures, index: int) -> Image.Image:
    picture = data[index][0]
    if not isinstance(picture, Image.Image):
        raise DataError(
            f"data {type(data).__name__}: expected pictures (PIL), found {type(picture).__name__}; leave the "
            "transform out: preprocessing is the model's"
        )
    return picture
