"""What keeping freed memory is worth on a CPU (certipatch.runtime.devices).

Training steps with and without it are timed in turn, and the weights after them compared.

    python benchmarks/keep_memory.py [--batch-size 64] [--rounds 3]

Each run is a fresh process of three steps, of which the fastest counts; equal hashes are equal weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time


def steps(keep: bool, batch_size: int) -> str:
    """Seconds of the fastest step, and the hash of the weights after all."""
    import torch
    import torch.nn.functional as F

    from certipatch.models.build import build, describe
    from certipatch.models.weights import weights_sha256
    from certipatch.runtime.devices import make_fabric

    if keep:
        make_fabric(device="cpu")
    torch.manual_seed(0)
    spec = describe("tf_efficientnet_lite0", classes=tuple(map(str, range(1000))), num_classes=1000)
    model = build(spec).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.rand(batch_size, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch_size,))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return f"{min(seconds):.3f} {weights_sha256(model)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=["plain", "keep"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(steps(asked.one == "keep", asked.batch_size))
        return
    ratios, hashes = [], set()
    for _ in range(asked.rounds):
        seconds = {}
        for which in ("plain", "keep"):
            command = [sys.executable, __file__, "--one", which, "--batch-size", str(asked.batch_size)]
            found, digest = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            seconds[which] = float(found)
            hashes.add(digest)
        ratios.append(seconds["plain"] / seconds["keep"])
        print(
            f"plain {seconds['plain']:.2f} s, keeping memory {seconds['keep']:.2f} s a step of "
            f"{asked.batch_size} images: {ratios[-1]:.2f}x"
        )
    if len(hashes) > 1:
        sys.exit("the weights after the steps differ")
    print("the weights after the steps are equal")


if __name__ == "__main__":
    main()
