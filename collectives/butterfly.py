"""Butterfly all-reduce: every shard goes straight to its owner, and from there straight to everybody.

The vector is cut into one shard per rank, in proportion to what each rank's line carries. A rank sends every other one
its numbers for that one's shard, adds up what comes for its own in the order of the ranks, and sends each finished
segment to all. Two hops, whatever the number of ranks, for the ring's ``2 (size - 1) / size`` of the vector per rank
where shards are equal; and a rank whose shard is empty sends and receives the vector once, the least possible for a
slow line. All that a rank sends first depends on nothing, so finished segments of one shard flow back while the
next ones are still on their way.

With shares ``w`` of the vector a rank sends ``1 + (size - 2) w`` of it, and receives as much.

Source: X. Li, J. Li, "Butterfly all-reduce" as in M. Ryabinin et al., "Moshpit SGD", NeurIPS 2021, section 3.1 (the
exchange of shards with their owners); the two phases are those of R. Thakur, R. Rabenseifner, W. Gropp, "Optimization
of collective communication operations in MPICH", Int. J. High Perform. Comput. Appl. 19 (2005), section 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sparkle_mesh.collectives.schedule import (
    ALIGN_ELEMENTS,
    Content,
    Receive,
    Reduce,
    Schedule,
    Send,
    Space,
    Step,
    segments,
    split_evenly,
)

Shards = tuple[tuple[int, int], ...]


def butterfly_all_reduce(
    rank: int, size: int, element_count: int, segment_elements: int, shards: Shards | None = None
) -> Schedule:
    """Return ``rank``'s part. All arguments but ``rank`` must be the same on every rank.

    ``shards`` are the ranges that each rank owns; equal ones if None.
    """
    if size == 1:
        return Schedule("butterfly", rank, size, element_count, (), Space.INPUT)
    cuts = [list(segments(*shard, segment_elements)) for shard in shards or split_evenly(element_count, size)]
    steps = scatter_steps(rank, cuts, Space.INPUT, Content.INPUT, 0)
    steps += reduce_steps(rank, cuts[rank], [peer for peer in range(size) if peer != rank])
    steps += gather_steps(rank, cuts, 1)
    return Schedule("butterfly", rank, size, element_count, tuple(steps))


Cut = Sequence[tuple[int, int, int]]


def scatter_steps(rank: int, cuts: Sequence[Cut], source: Space, content: Content, turn: int) -> list[Step]:
    """Send every other rank the segments of its shard: a segment to each in turn, beginning with the neighbour."""
    size = len(cuts)
    steps: list[Step] = []
    for index in range(max(map(len, cuts))):
        for peer in ((rank + ahead) % size for ahead in range(1, size)):
            if index < len(cuts[peer]):
                number, start, stop = cuts[peer][index]
                steps.append(Send(peer, start, stop, source, turn, number, content))
    return steps


def reduce_steps(rank: int, cut: Cut, peers: Sequence[int], finish: bool = True) -> list[Step]:
    """Add up what ``peers`` send of this rank's own segments, in their order."""
    steps: list[Step] = []
    for number, start, stop in cut:
        for order, peer in enumerate(peers):
            steps.append(Receive(peer, start, stop, Space.SCRATCH, 0, number, Content.INPUT))
            last = finish and order == len(peers) - 1
            steps.append(Reduce(peer, start, stop, Space.WORK if order else Space.INPUT, last))
    return steps


def gather_steps(rank: int, cuts: Sequence[Cut], turn: int) -> list[Step]:
    """Send this rank's finished segments to all others, and take theirs."""
    size = len(cuts)
    steps: list[Step] = []
    for index in range(max(map(len, cuts))):
        for ahead in range(1, size):
            if index < len(cuts[rank]):
                number, start, stop = cuts[rank][index]
                steps.append(Send((rank + ahead) % size, start, stop, Space.WORK, turn, number, Content.RESULT))
            peer = (rank - ahead) % size
            if index < len(cuts[peer]):
                number, start, stop = cuts[peer][index]
                steps.append(Receive(peer, start, stop, Space.WORK, turn, number, Content.RESULT))
    return steps


def split_by_weight(element_count: int, weights: Sequence[float], align: int = ALIGN_ELEMENTS) -> Shards:
    """Cut ``[0, element_count)`` into ranges in proportion to ``weights``, which begin at multiples of ``align``.

    >>> split_by_weight(100, [1, 0, 1], align=10)
    ((0, 50), (50, 50), (50, 100))
    """
    total = sum(weights)
    bounds = [0]
    so_far = 0.0
    for weight in weights[:-1]:
        so_far += weight
        bounds.append(min(round(element_count * so_far / total / align) * align, element_count))
    # What rounding leaves over is for the last that has a share at all.
    bounds.append(element_count)
    last = max(index for index, weight in enumerate(weights) if weight > 0)
    bounds[last + 1 :] = [element_count] * (len(bounds) - last - 1)
    return tuple(pairwise(bounds))
