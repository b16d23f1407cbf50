"""What every certified defense offers, and the premises of every certificate on the model and the images.

A defense is a folder beside this file and one row in ``certification/methods.py``; with these it has
``certify``, resume, shards, records, report, page and ``verify``. A certificate depends on nothing but this
room and those below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import SoundnessError
from ..geometry.patch import Size, Threat

FLOATS = (torch.float32, torch.float64)  # the numbers that images and weights may be of


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a defense found out about one image. A method that has more to say adds fields in a class of its
    own.

    Attributes:
        label: the true label, None if none was given.
        vanilla_label: the undefended model's label F(x).
        defended_label: the label that the defense answers, None if it raises an alarm in place of an answer.
        certified: the defense keeps its promise for the true label under every patch of its threat, proven;
            None if no label was given.
        margin: how far the closest decision behind this was from turning, None if the method has no such
            number.
        passes: forward passes spent on this image.
    """

    label: int | None
    vanilla_label: int
    defended_label: int | None
    certified: bool | None
    margin: float | None
    passes: int

    @property
    def detail(self) -> dict[str, Any]:
        """What the method adds, by the names of its fields: these stand in the records too."""
        common = {field.name for field in fields(Verdict)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}


class CertifiedDefense(Protocol):
    """A model with a defense around it whose answers can be certified.

    Attributes:
        name: what the defense is called in manifests and on the command line.
        threat: what the certificate is against.
    """

    name: str

    @property
    def threat(self) -> Threat: ...

    def examine(self, images: Tensor, labels: Tensor | None = None) -> Sequence[Verdict]:
        """One verdict for each of (N, 3, H, W) float images in [0, 1].

        With labels, (N,) int64, the certificates are found out too.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Whatever can change a result, as JSON: it becomes part of the experiment.

        ``precision`` is among it, and ``masks``; a defense without masks says instead what it is against,
        under ``threat``.
        """
        ...

    def describe_network(self) -> dict[str, Any]:
        """How the network is run, as JSON: what changes rounding only, and makes an equal one."""
        ...


def check_precision(defense: CertifiedDefense, certified: str) -> None:
    """Refuse a defense whose network does not run here in the precision that it was certified in.

    Raises SoundnessError.
    """
    found = defense.describe()["precision"]
    if found != certified:
        raise SoundnessError(
            f"precision: expected {certified}, in which it was certified, found {found}, in which the model "
            "runs here; certify again on this machine"
        )


def check_model(model: nn.Module) -> None:
    """Refuse a model whose answer for an image may depend on more than the image.

    Raises SoundnessError for parameters of less than float32, training mode, or a BatchNorm without running
    statistics.
    """
    found = float_type(model)
    if found not in FLOATS:
        raise SoundnessError(
            f"model: expected parameters in torch.float32, found {found}; call model.float() (precision= "
            "sets that of the forward pass)"
        )
    if any(module.training for module in model.modules()):
        raise SoundnessError("model: expected evaluation mode, found training mode; call model.eval() first")
    batch_norm = nn.modules.batchnorm._BatchNorm
    if any(isinstance(module, batch_norm) and module.running_mean is None for module in model.modules()):
        raise SoundnessError(
            "model: expected answers that depend on one image alone, found a BatchNorm without running "
            "statistics, which mixes the images of a batch; set track_running_stats"
        )
    for name, module in model.named_modules():
        if _is_quantised_dynamically(module):
            raise SoundnessError(
                f"model: expected answers that depend on one image alone, found {name or 'itself'} "
                f"({type(module).__name__}) quantised dynamically: it rounds by the largest value of the "
                "batch; quantise statically, or certify in bf16-mixed"
            )


def _is_quantised_dynamically(module: nn.Module) -> bool:
    """Whether a module scales its integers by what is in the batch: torch's own way, or torchao's.

    torchao leaves the module as it was and gives it weights that say so by their type.
    """
    if ".quantized.dynamic" in type(module).__module__:
        return True
    kinds = [f"{type(each).__module__}.{type(each).__name__}" for each in module.parameters(recurse=False)]
    return any("torchao" in kind and ("Activation" in kind or "Dynamic" in kind) for kind in kinds)


def float_type(model: nn.Module) -> torch.dtype:
    """The type of the model's parameters, of several the narrowest; float32 for a model without any."""
    types = {each.dtype for each in model.parameters() if each.is_floating_point()}
    return min(types, key=lambda each: each.itemsize, default=torch.float32)


def check_same_type(images: Tensor, model: nn.Module) -> None:
    """Refuse images of other numbers than the model's parameters, if it has some. Raises SoundnessError."""
    expected = float_type(model) if any(True for _ in model.parameters()) else images.dtype
    if len(images) and images.dtype != expected:
        raise SoundnessError(
            f"images: expected {expected} as the model's parameters are, found {images.dtype}; convert the "
            "images, or call model.float()"
        )


def check_images(images: Tensor, image_size: Size) -> None:
    """Refuse images that are not (N, 3, H, W) floats in [0, 1] of this size. Raises SoundnessError."""
    if not isinstance(images, Tensor):
        raise SoundnessError(
            f"images: expected a tensor of torch.float32, found {type(images).__name__}; "
            "torch.as_tensor makes one"
        )
    _refuse_empty_shells("images", images)
    expected = (3, *image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise SoundnessError(
            f"images: expected (N, {', '.join(map(str, expected))}), found {tuple(images.shape)}; resize "
            "them or build masks of that size"
        )
    if images.dtype not in FLOATS:
        how = "call images.float()" if images.is_floating_point() else "divide 8 bits by 255"
        raise SoundnessError(f"images: expected torch.float32 in [0, 1], found {images.dtype}; {how}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise SoundnessError(
            "images: expected float values in [0, 1], found others; normalisation belongs inside the model"
        )


def check_labels(labels: Tensor | None, images: Tensor, classes: int | None = None) -> None:
    """Refuse labels that are not one int64 class from 0 up for each image, or that are none of so many
    classes, where their number is known. Raises SoundnessError."""
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise _wrong_labels(type(labels).__name__, images)
    _refuse_empty_shells("labels", labels)
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise _wrong_labels(f"{labels.dtype} {tuple(labels.shape)}", images)
    for label in labels.tolist():
        if label < 0 or (classes is not None and label >= classes):
            raise _wrong_labels(f"the label {label}", images, classes)


def _refuse_empty_shells(name: str, values: Tensor) -> None:
    """Raises SoundnessError for tensors that do not hold each value at its place."""
    if values.is_meta or values.layout != torch.strided:
        kind = "one on the meta device" if values.is_meta else str(values.layout)
        raise SoundnessError(f"{name}: expected a dense tensor with values, found {kind}; call to_dense()")


def _wrong_labels(found: str, images: Tensor, classes: int | None = None) -> SoundnessError:
    end = "up" if classes is None else f"to {classes - 1}, which the model tells apart"
    return SoundnessError(
        f"labels: expected an int64 tensor ({len(images)},) of classes from 0 {end}, found {found}"
    )
