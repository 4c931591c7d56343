"""What the examples that train on handwritten digits have in common: the data set, and the network's first weights."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

HIDDEN_UNITS = 96
TEST_SHARE = 0.2


def load_data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return train images (n, 64) and labels (n,), then those held out: split alike wherever the seed is the same."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images, labels = (digits.data[order] / 16.0).astype(np.float32), digits.target[order]
    held_out = int(len(labels) * TEST_SHARE)
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]


def initial_weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return weights of a 64-96-10 network, He-initialised; all float32."""

    def layer(inputs: int, outputs: int) -> np.ndarray:
        scale = np.float32(np.sqrt(2.0 / inputs))
        return scale * random.standard_normal((inputs, outputs), dtype=np.float32)

    return {
        "w1": layer(64, HIDDEN_UNITS),
        "b1": np.zeros(HIDDEN_UNITS, np.float32),
        "w2": layer(HIDDEN_UNITS, 10),
        "b2": np.zeros(10, np.float32),
    }
