"""What the ranks of a view know of the ways between them, and what follows for who sends what to whom.

All of it is the same on every rank, so that all reach the same plans without asking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations

from sparkle_mesh import limits

#: Of a line that nothing is known of: as good as any.
DEFAULT_LINE_BYTES_PER_S = limits.TOPOLOGY_LINE_MAX_BYTES_PER_S
DEFAULT_LATENCY_S = 50e-6


@dataclass(frozen=True, eq=False)
class Topology:
    """The ways between ranks.

    Attributes
    ----------
    size
        The number of ranks.
    hosts
        Per rank, a number that only ranks of the same host share.
    lines_bytes_per_s
        What each rank's host can send, and receive at the same time, in bytes per second.
    latency_s
        One way, in seconds, between two ranks: by rank and rank; empty if all are as the default.
    """

    size: int
    hosts: tuple[int, ...] = ()
    lines_bytes_per_s: tuple[float, ...] = ()
    latency_s: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    @cached_property
    def host_of(self) -> tuple[int, ...]:
        """``hosts``, all one host if nothing is known."""
        return self.hosts or (0,) * self.size

    @cached_property
    def host_count(self) -> int:
        """The number of hosts."""
        return len(set(self.host_of))

    @cached_property
    def lines(self) -> tuple[float, ...]:
        """``lines_bytes_per_s``, with the default for what is not known."""
        return self.lines_bytes_per_s or (DEFAULT_LINE_BYTES_PER_S,) * self.size

    def latency(self, one: int, other: int) -> float:
        """Return the seconds from one rank to another."""
        return self.latency_s[one][other] if self.latency_s else DEFAULT_LATENCY_S

    def distance(self, one: int, other: int) -> float:
        """Return the seconds from one rank to another over a line; 0 within a host."""
        return 0.0 if self.hosts and self.hosts[one] == self.hosts[other] else self.latency(one, other)

    @cached_property
    def worst_latency_s(self) -> float:
        """The seconds of the longest way."""
        if not self.latency_s:
            return DEFAULT_LATENCY_S
        return max((self.latency(a, b) for a in range(self.size) for b in range(self.size) if a != b), default=0.0)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """What part of a vector each rank shall own, so that all lines are done at the same time."""
        return tuple(shard_shares([line / ranks for line, ranks in zip(self.lines, self.ranks_per_host, strict=True)]))

    @cached_property
    def ranks_per_host(self) -> tuple[int, ...]:
        """Per rank, how many ranks its host has."""
        counts = Counter(self.host_of)
        return tuple(counts[host] for host in self.host_of)

    @cached_property
    def is_uneven(self) -> bool:
        """Whether some lines are so much slower than others that shards differ."""
        return max(self.shares) > min(self.shares)

    def pace_bytes_per_s(self, rank: int, other: int) -> float | None:
        """How fast ``rank`` shall send to ``other`` where all send to all at once; None if as fast as can be.

        A little more than a part of the line at whose end what all send comes together, where the slowest line is what
        all wait for anyway: the queues before the others do not overflow.
        """
        if self.host_of[rank] == self.host_of[other]:
            return None
        line = min(self.lines[rank], self.lines[other])
        if 2 * self.latency(rank, other) >= limits.LINK_NEAR_ROUND_TRIP_S:
            # What is sent over a long way is paced by what it measures itself.
            return None
        if not self.is_uneven:
            return None
        # All ranks of other hosts send to all of this one.
        ranks = self.ranks_per_host[rank if line == self.lines[rank] else other]
        return limits.TOPOLOGY_PACE_RATIO * line / max(ranks * (self.size - ranks), 1)

    @cached_property
    def ring_order(self) -> tuple[int, ...]:
        """The ranks in the order in which a ring of them is fastest."""
        return ring_order(self)


def shard_shares(lines: Sequence[float]) -> list[float]:
    """Return each rank's share of a vector, such that the slowest of them is done as early as can be.

    With a share ``w`` a rank sends ``1 + (size - 2) w`` vectors and receives as many. In time ``t`` a line of rate
    ``c`` so bears a share of ``(t c - 1) / (size - 2)``; the least ``t`` for which the shares come to 1 is found by
    taking ranks in the order of their lines, the fastest first: it is exact.

    >>> shard_shares([1.0, 1.0, 1.0, 0.1])
    [0.3333333333333333, 0.3333333333333333, 0.3333333333333333, 0.0]
    """
    size = len(lines)
    if size <= 2 or max(lines) <= min(lines) * limits.TOPOLOGY_EQUAL_LINES_RATIO:
        return [1 / size] * size
    order = sorted(range(size), key=lambda rank: -lines[rank])
    bearing, time = order, 0.0
    for count in range(1, size + 1):
        # The time in which the fastest ``count`` bear everything, if all of these bear something.
        bearing = order[:count]
        time = (size - 2 + count) / sum(lines[rank] for rank in bearing)
        if count == size or time * lines[order[count]] <= 1:
            break
    # Whoever is slower than that sends one vector, whatever is done; nobody need be faster.
    time = max(time, 1 / min(lines))
    most = [min(max((time * line - 1) / (size - 2), 0.0), 1.0) for line in lines]
    total = sum(most)
    return [share / total for share in most]


def ring_order(topology: Topology) -> tuple[int, ...]:
    """Return the order of ranks in which the ways from each to the next are shortest in all.

    Exact up to ``limits.TOPOLOGY_RING_EXACT_MAX_COUNT`` ranks, by trying all; above, the nearest next one from rank 0,
    improved by turning around stretches of it for as long as that helps (2-opt: G. A. Croes, "A method for solving
    traveling-salesman problems", Operations Research 6 (1958)).
    """
    size = topology.size
    if (not topology.latency_s and topology.host_count in (1, size)) or size <= 3:
        return tuple(range(size))

    def length(order: Sequence[int]) -> float:
        return sum(topology.distance(order[at - 1], order[at]) for at in range(size))

    given = tuple(range(size))
    if size <= limits.TOPOLOGY_RING_EXACT_MAX_COUNT:
        best = min(((0, *rest) for rest in permutations(range(1, size))), key=length)
        return best if length(best) < length(given) / limits.TOPOLOGY_EQUAL_LINES_RATIO else given
    order, left = [0], set(range(1, size))
    while left:
        order.append(min(left, key=lambda other: (topology.distance(order[-1], other), other)))
        left.discard(order[-1])
    for _ in range(limits.TOPOLOGY_RING_ROUNDS_COUNT):
        if not _turn_around(topology, order):
            break
    return tuple(order) if length(order) < length(given) / limits.TOPOLOGY_EQUAL_LINES_RATIO else given


def _turn_around(topology: Topology, order: list[int]) -> bool:
    """Turn around every stretch for which that shortens the ring; return whether there was one."""
    size, better = len(order), False
    for low in range(1, size - 1):
        for high in range(low + 1, size):
            before, first, last, after = order[low - 1], order[low], order[high], order[(high + 1) % size]
            old = topology.distance(before, first) + topology.distance(last, after)
            new = topology.distance(before, last) + topology.distance(first, after)
            if new < old * (1 - 1e-9):
                order[low : high + 1] = reversed(order[low : high + 1])
                better = True
    return better
