"""Sources of randomness that are the same in each run."""

from __future__ import annotations

import random


class SeededEntropy:
    """Random, and the same in each run."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def token(self, nbytes: int) -> bytes:
        return self._random.randbytes(nbytes)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


class FixedEntropy:
    """Tokens that tell how many were drawn before."""

    def __init__(self) -> None:
        self.drawn = 0

    def token(self, nbytes: int) -> bytes:
        self.drawn += 1
        return bytes([self.drawn]) * nbytes

    def uniform(self, low: float, high: float) -> float:
        return low
