"""What the compiled search finds beside the plain one in float32, before and after training steps.

    python benchmarks/same_masks.py [--images 32] [--data ../shared/data/imagenet-sample]

On photographs, of each precision: how many images get the very masks of the plain search, in both copies;
the mean float32 loss under the masks found, as a share of that under those of the plain search; milliseconds
a view. For scale: two masks at random; and what a view takes if the weights may be part of the code, which
those of a model in training cannot be.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from certipatch import MaskSet
from certipatch.data.load import load_source
from certipatch.data.source import Images, as_float, collate
from certipatch.models.build import build, describe
from certipatch.models.weights import LITE0_PACKAGE
from certipatch.runtime.devices import autocast, make_fabric
from certipatch.training.strategies import STRATEGIES
from certipatch.views.masked import find_mean, mask_images, visible
from certipatch.views.masked import frozen as evaluation
from certipatch.views.network import Network


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/imagenet-sample"))
    asked = parser.parse_args()
    make_fabric(device="cpu")
    torch.manual_seed(0)
    source = load_source(str(asked.data / "val.tar"), class_map=str(asked.data / "class_map.txt")).first(
        asked.images
    )
    spec = describe("tf_efficientnet_lite0", classes=source.classes, num_classes=1000)
    model = build(spec, weights=LITE0_PACKAGE)
    images = Images(source, spec)
    pixels, labels = collate([images[i] for i in range(len(source))])
    x, masks = (
        as_float(pixels),
        MaskSet.covering(image_size=(224, 224), patch_size=(39, 39), masks_per_axis=6),
    )
    fill = torch.as_tensor(find_mean(model)).expand(3)
    search = STRATEGIES["greedy-multisize"]

    def compiled(precision: str, *, frozen: bool = False) -> Network:
        with evaluation(model):
            return Network(
                model, masks, fill=fill, batch_size=32, precision=precision, compile=True, frozen=frozen
            )

    @torch.inference_mode()
    def loss(found: torch.Tensor) -> float:
        views = [mask_images(x, visible(windows, masks.image_size), fill) for windows in found.unbind(1)]
        return sum(float(F.cross_entropy(model(each), labels)) for each in views)

    looks = {
        "plain": None,
        "32-true": compiled("32-true"),
        "bf16-mixed": compiled("bf16-mixed"),
        "bf16-mixed with the first weights in the code": compiled("bf16-mixed", frozen=True),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for steps in range(3):
        random = torch.stack(
            STRATEGIES["random-both"](
                model, x, labels, masks, fill=fill, generator=torch.Generator().manual_seed(steps)
            ),
            dim=1,
        )
        for name, look in looks.items():
            started = time.perf_counter()
            with autocast("32-true" if look is None else look.precision, x.device):
                found = torch.stack(search(model, x, labels, masks, fill=fill, look=look), dim=1)
            milliseconds = 1000 * (time.perf_counter() - started) / len(x) / 25
            if look is None:
                plain, best = found, loss(found)
                print(f"after {steps} steps: random masks {loss(random) / best:.3f} of the loss")
            same = int((found == plain).flatten(1).all(dim=1).sum())
            print(
                f"  {name}: {same} of {len(x)} images the same, {loss(found) / best:.3f} of the loss, "
                f"{milliseconds:.1f} ms a view",
                flush=True,
            )
        F.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()


if __name__ == "__main__":
    main()
