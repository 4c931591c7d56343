"""Virtual time, and messages between simulated processes: in order, delayed at random, held up by partitions."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, fields

from sparkle_mesh.membership.view import Member

#: Of a slow way at most: several times as long as any on Earth.
_SLOW_MEAN_DELAY_S = 0.5


class InvariantBroken(AssertionError):
    """A safety or progress property does not hold; the message tells which, and the seed."""


@dataclass(slots=True)
class Counts:
    """How often something happened, by what it was; the fields are those of whoever counts."""

    def add(self, other: Counts) -> None:
        """Add the counts of ``other``, which counts the same."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Network:
    """The time and the ways of one seed's world.

    Attributes
    ----------
    now
        Seconds since the beginning.
    random
        All chance comes from it.
    trace
        What happened, line by line.
    severed
        From whom nothing comes to whom for now.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 0.0
        self.random = random.Random(seed)
        self.trace: list[str] = []
        self.severed: set[tuple[Member, Member]] = set()
        self.mean_delay_s = self.random.choice([0.001, 0.02, 0.2])
        #: How likely one way is slower than others, so that news come by a third sooner.
        self._slow_share = self.random.choice([0.0, 0.0, 0.15])
        self._slowness: dict[tuple[Member, Member], float] = {}
        self._held: dict[tuple[Member, Member], list[Callable[[], None]]] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._arrivals: dict[tuple[Member, Member], float] = {}

    def next_at(self) -> float | None:
        """When the next thing happens; None if nothing will."""
        return self._queue[0][0] if self._queue else None

    def step(self) -> None:
        """Let the next thing happen."""
        self.now, _, action = heapq.heappop(self._queue)
        action()

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (when, self._sequence, action))

    def after(self, mean_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + self.random.expovariate(1 / mean_s), action)

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now:9.4f} {text}")

    def broken(self, what: str) -> InvariantBroken:
        """Return the error to raise."""
        return InvariantBroken(f"seed {self.seed}: {what}")

    def transmit(self, sender: Member, receiver: Member, arrive: Callable[[], None]) -> None:
        """In order, after a delay; once they are no longer cut off from each other, if they are."""
        key = (sender, receiver)

        def deliver() -> None:
            if key in self.severed:
                self._held.setdefault(key, []).append(arrive)
            else:
                arrive()

        if key not in self._slowness:
            slow = self.random.random() < self._slow_share
            self._slowness[key] = min(20.0, _SLOW_MEAN_DELAY_S / self.mean_delay_s) if slow else 1.0
        delay = self.random.expovariate(1 / self.mean_delay_s) * self._slowness[key]
        self._arrivals[key] = max(self._arrivals.get(key, 0.0), self.now + delay)
        self.at(self._arrivals[key], deliver)

    def heal(self, sender: Member, receiver: Member) -> None:
        """What ``sender`` has said, and says, comes to ``receiver`` again."""
        key = (sender, receiver)
        self.severed.discard(key)
        for arrive in self._held.pop(key, []):
            self._arrivals[key] = max(self._arrivals.get(key, 0.0), self.now)
            self.at(self.now, arrive)
