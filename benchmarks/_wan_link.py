"""The arithmetic of emulated links: rate, queue, delay and loss, in virtual time.

Nothing here reads a clock. A :class:`Queue` remembers when it will have sent all that it holds; whoever is late to ask
is told times in the past and catches up, so that lateness does not add up.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from _wan_packets import Burst

MIN_QUEUE_BYTES = 512 << 10
# The kernel paces a card by itself, in bursts of about this long at 1 Gbit/s; pauses shorter than that are not the
# link's, and would add up to a slower one.
CARD_GRACE_S = 0.0005


@dataclass(frozen=True)
class Settings:
    """What one host's access to the network is like; ``delay_s`` and ``loss`` are for what it sends."""

    up_bits_per_s: float = 100e6
    down_bits_per_s: float = 100e6
    delay_s: float = 0.0
    loss: float = 0.0
    queue_bytes: int | None = None
    card: bool = False  # whether the uplink is the host's own card, where senders wait and nothing is dropped

    def __post_init__(self) -> None:
        """Refuse what no network can be."""
        if not (self.up_bits_per_s > 0 and self.down_bits_per_s > 0):
            raise ValueError(f"a rate of {min(self.up_bits_per_s, self.down_bits_per_s)} bit/s: must be above 0")
        if not 0 <= self.delay_s < 60:
            raise ValueError(f"a delay of {self.delay_s} s: must be from 0 to 60 s")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"a loss of {self.loss}: must be a share from 0 to 1")
        if self.queue_bytes is not None and self.queue_bytes < 1:
            raise ValueError(f"a queue of {self.queue_bytes} bytes: must hold at least 1")

    def up_queue(self) -> Queue:
        """Return the uplink's queue, which is in the kernel if the uplink is the host's card."""
        if self.card:
            return Queue(self.up_bits_per_s, 1 << 40, CARD_GRACE_S)
        return Queue(self.up_bits_per_s, self.queue_for(self.up_bits_per_s))

    def down_queue(self) -> Queue:
        """Return the downlink's queue."""
        return Queue(self.down_bits_per_s, self.queue_for(self.down_bits_per_s))

    def queue_for(self, bits_per_s: float) -> int:
        """Return the bytes that a queue of this rate holds: by default one bandwidth-delay product, and 512 KiB."""
        if self.queue_bytes is not None:
            return self.queue_bytes
        return max(MIN_QUEUE_BYTES, math.ceil(bits_per_s / 8 * 2 * self.delay_s))


class Queue:
    """A link of one rate behind a queue that drops what does not fit.

    What is sent without pause may be noticed up to ``grace_s`` late and counts as sent without pause.
    """

    def __init__(self, bits_per_s: float, limit_bytes: int, grace_s: float = 0.0) -> None:
        self.grace_s = grace_s
        self.seconds_per_byte = 8 / bits_per_s
        self.limit_bytes = limit_bytes
        self.free_at = 0.0
        self.dropped_segments = 0
        self.sent_bytes = 0
        self.longest_bytes = 0.0

    def change(self, other: Queue, now: float) -> None:
        """Take on the rate and the limit of ``other`` from ``now`` on; what waits is sent at the new rate."""
        waiting = max(0.0, self.free_at - now) / self.seconds_per_byte
        self.seconds_per_byte = other.seconds_per_byte
        self.limit_bytes = other.limit_bytes
        self.free_at = now + waiting * self.seconds_per_byte

    def admit(self, burst: Burst, now: float) -> Burst | None:
        """Return what of ``burst`` fits at ``now``: all of it, its first segments, or None."""
        waiting = (self.free_at - now) / self.seconds_per_byte
        waiting = max(waiting, 0.0)
        room = self.limit_bytes - waiting
        # A link that is idle takes a packet of any size.
        if burst.wire_bytes <= room or (waiting <= 0 and burst.segments == 1):
            self.longest_bytes = max(self.longest_bytes, waiting + burst.wire_bytes)
            return burst
        fitting = min(max(0, int(room // burst.segment)), burst.segments)
        if not fitting and waiting <= 0:
            fitting = 1
        self.dropped_segments += burst.segments - fitting
        return burst.part(0, fitting) if fitting else None

    def send(self, burst: Burst, first_at: float, last_at: float) -> tuple[float, float]:
        """Send what arrives from ``first_at`` to ``last_at``; return when its sending begins and ends.

        Segments are passed on as they come in, so a burst ends one segment's time after its last one came at the
        earliest, and one burst's time after it began. What comes in slowly, from a slower link, leaves gaps: it takes
        up no more of this link than its bytes, and others' segments go between.
        """
        begins = max(first_at - self.grace_s if burst.segments > 1 else first_at, self.free_at)
        alone = min(burst.segment, burst.wire_bytes) * self.seconds_per_byte
        self.free_at = begins + burst.wire_bytes * self.seconds_per_byte
        self.sent_bytes += burst.wire_bytes
        return begins, max(self.free_at, last_at + alone)


class Loss:
    """Drops each segment with the same probability, reproducibly by its seed."""

    def __init__(self, probability: float, seed: str) -> None:
        self._random = random.Random(seed)
        self.lost_segments = 0
        self.set(probability)

    def set(self, probability: float) -> None:
        """Change the probability from the next segment on."""
        self.probability = probability
        self._until = self._draw()

    def _draw(self) -> int:
        """Return how many segments pass before the next is lost."""
        if self.probability <= 0:
            return 1 << 62
        if self.probability >= 1:
            return 0
        return int(math.log(1 - self._random.random()) / math.log(1 - self.probability))

    def passing(self, segments: int) -> list[tuple[int, int]]:
        """Return which of the next ``segments`` pass, as ranges."""
        if segments <= self._until:
            self._until -= segments
            return [(0, segments)]
        ranges = []
        at = 0
        while segments - at > self._until:
            lost = at + self._until
            if lost > at:
                ranges.append((at, lost))
            at = lost + 1
            self.lost_segments += 1
            self._until = self._draw()
        if at < segments:
            ranges.append((at, segments))
        self._until -= segments - at
        return ranges
