"""Tiny random classifiers, images for them, and what they answer on one view at a time."""

from functools import cache

import torch
from torch import nn

import oracle
from certipatch.geometry.masks import MaskSet

SIZE = (12, 12)
PATCH = {3: (3, 3), 6: (2, 2)}  # by masks per axis: 12 pixels leave room for 3 and 6 masks an axis
FILL = 0.5


def mask_set(k):
    return MaskSet.covering(image_size=SIZE, patch_size=PATCH[k], masks_per_axis=k)


def keeps_of(k):
    """The same masks from the oracle."""
    return [
        torch.from_numpy(oracle.keep_of(SIZE, mask)) for mask in oracle.covering_set(SIZE, PATCH[k], k)[0]
    ]


class Contrast(nn.Module):
    """Grey is 0, as after normalisation, so that random weights tell images and masks apart."""

    def forward(self, images):
        return 4 * (images - 0.5)


def network(seed):
    """A tiny random classifier in double precision, so that no answer hangs on the rounding of a batch."""
    torch.manual_seed(seed)
    layers = [Contrast(), nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 4)]
    return nn.Sequential(*layers).double().eval()


def pictures(seed, k=3):
    """Noisy images of one colour each: the less noise, the likelier a certificate. Fewer where an image has
    666 views."""
    n = 8 if k == 3 else 4
    generator = torch.Generator().manual_seed(100 + seed)
    noise = torch.rand(n, 3, *SIZE, generator=generator, dtype=torch.float64)
    colour = torch.rand(n, 3, 1, 1, generator=generator, dtype=torch.float64)
    share = torch.linspace(0, 0.9, n).view(n, 1, 1, 1)
    return (1 - share) * noise + share * colour


@torch.no_grad()
def naive_view(model, image, keep, fill=FILL):
    """Label and margin (best minus second-best logit) of one view, in a forward pass of its own."""
    logits = model(
        torch.where(keep, image, torch.as_tensor(fill, dtype=image.dtype).reshape(-1, 1, 1))[None]
    )[0]
    best, second = logits.sort(descending=True).values[:2].tolist()
    return int(logits.argmax()), best - second


@cache
def naive(seed, k):
    """For each image: the unmasked label, the table of labels, and the smallest margin of all its masked
    views."""
    model, keeps, found = network(seed), keeps_of(k), []
    for image in pictures(seed, k):
        table = [[0] * len(keeps) for _ in keeps]
        margins = []
        for i, a in enumerate(keeps):
            for j in range(i, len(keeps)):
                table[i][j], margin = naive_view(model, image, a & keeps[j])
                table[j][i] = table[i][j]
                margins.append(margin)
        found.append((naive_view(model, image, torch.ones(SIZE, dtype=torch.bool))[0], table, min(margins)))
    return found


def true_labels(seed, k):
    """The defended labels, but a wrong one for the second image."""
    labels = [oracle.double_masking(table)[0] for _, table, _ in naive(seed, k)]
    labels[1] = (labels[1] + 1) % 4
    return torch.tensor(labels)


class Views:
    """Counts, and on demand keeps, what a model sees."""

    def __init__(self, model, keep=False):
        self.forget()

        def hook(_module, inputs, _output):
            self.seen += len(inputs[0])
            self.batches.append(len(inputs[0]))
            if keep:
                self.images.extend(inputs[0].clone())

        model.register_forward_hook(hook)

    def forget(self):
        """Leave out what the model saw until now: a defense looks at some probes before it is used."""
        self.seen, self.images, self.batches = 0, [], []
