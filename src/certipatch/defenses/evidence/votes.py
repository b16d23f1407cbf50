"""What the logits of windows say as integers: the evidence of each defense, rounded once.

Every function maps the logits (windows, classes) of a network to evidence of that shape, int64, row by row:
what one window says depends on its own logits. Computed in float64.

| function | defense | values |
|---|---|---|
| :func:`votes` | De-randomized Smoothing | 0 or 1, for each class alone |
| :func:`best_vote` | Smoothed ViT | one 1 a window |
| :func:`step` | BagCert | 0 or 1, for each class alone |
| :func:`clipped_tanh` | Clipped BagNet | -2^16 to 2^16 |
| :func:`positive` | PatchGuard on a BagNet | 0 to 2^20 |
| :func:`confidence` | PatchGuard on bands | 0 to 2^20 |
"""

from __future__ import annotations

import numpy as np

from ...errors import ConfigError, SoundnessError

TANH = 2**16  # steps in 1
CONFIDENCE = 2**20  # steps in 1
LOGIT, MOST = 2**10, 2**10  # steps in 1, and the largest logit that counts


def votes(logits: np.ndarray, *, theta: float) -> np.ndarray:
    """1 for each class whose confidence is at least theta: none, one or several a window.

    Raises ConfigError for a theta outside [0, 1].
    """
    if not 0 <= theta <= 1:  # NaN is not either
        raise ConfigError(f"theta {theta:g}: expected a confidence from 0 to 1")
    return (_softmax(logits) >= theta).astype(np.int64)


def best_vote(logits: np.ndarray) -> np.ndarray:
    """1 for the class of the largest logit, the smallest of equals."""
    best = _checked(logits).argmax(axis=1)
    return (best[:, None] == np.arange(logits.shape[1])).astype(np.int64)


def step(logits: np.ndarray) -> np.ndarray:
    """1 for each class whose logit is above 0."""
    return (_checked(logits) > 0).astype(np.int64)


def clipped_tanh(logits: np.ndarray) -> np.ndarray:
    """tanh(0.05 z - 1) in steps of 2^-16."""
    return _rounded(np.tanh(0.05 * _checked(logits) - 1) * TANH)


def positive(logits: np.ndarray) -> np.ndarray:
    """Logits from 0 to 2^10, others clipped, in steps of 2^-10."""
    return _rounded(_checked(logits).clip(0, MOST) * LOGIT)


def confidence(logits: np.ndarray) -> np.ndarray:
    """The softmax of each window in steps of 2^-20."""
    return _rounded(_softmax(logits) * CONFIDENCE)


def _softmax(logits: np.ndarray) -> np.ndarray:
    logits = _checked(logits)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int64)


def _checked(logits: np.ndarray) -> np.ndarray:
    """The logits in float64.

    Raises SoundnessError if they are no floats (windows, 2 or more classes), or not all finite: an attacker
    may cause an error, but no answer.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.dtype.kind != "f":
        raise SoundnessError(
            f"logits: expected floats (windows, 2 or more classes), found {logits.dtype} {logits.shape}"
        )
    if not np.isfinite(logits).all():
        raise SoundnessError(
            "logits: expected finite numbers, found NaN or infinity; check the weights and the precision"
        )
    return np.ascontiguousarray(logits, dtype=np.float64)
