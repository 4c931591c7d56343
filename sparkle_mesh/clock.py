"""The only place that reads the time or draws random bytes.

Everything with states takes ``now`` as an argument and its randomness from a :class:`Clock`'s sibling,
:class:`Entropy`, so that a simulator can supply both.
"""

from __future__ import annotations

import secrets
import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds, and wall-clock time for what is written to disk or shown."""

    def now(self) -> float:
        """Monotonic seconds; only differences mean anything."""
        ...

    def wall_time(self) -> float:
        """Seconds since the Unix epoch; may jump, never used for deadlines."""
        ...


class Entropy(Protocol):
    """A source of random bytes and fractions."""

    def token(self, nbytes: int) -> bytes:
        """Return ``nbytes`` random bytes fit for keys and nonces."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """Return a number in ``[low, high)``, for jitter."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.monotonic()

    def wall_time(self) -> float:
        return time.time()


class SystemEntropy:
    """The operating system's random source."""

    def __init__(self) -> None:
        self._random = secrets.SystemRandom()

    def token(self, nbytes: int) -> bytes:
        return secrets.token_bytes(nbytes)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


SYSTEM_CLOCK = SystemClock()
SYSTEM_ENTROPY = SystemEntropy()
