"""Ring all-reduce: a reduce-scatter, then an all-gather, each once around the ring.

The vector is cut into one shard per rank. In round ``k`` of the reduce-scatter rank ``r`` passes shard
``r - k`` on to rank ``r + 1`` and adds its own numbers to shard ``r - k - 1``, so that after ``size - 1``
rounds it owns the finished shard ``r + 1``; the all-gather then passes finished shards around. Every rank
sends ``2 (size - 1) / size`` of the vector, which is the least possible, in ``2 (size - 1)`` rounds, which is not.

Shards are cut into segments and a segment goes on as soon as it is reduced, so rounds overlap.

Source: P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
J. Parallel Distrib. Comput. 69 (2009), section 4.
"""

from __future__ import annotations

from sparkle_mesh.collectives.schedule import (
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


def ring_all_reduce(
    rank: int, size: int, element_count: int, segment_elements: int, order: tuple[int, ...] | None = None
) -> Schedule:
    """Return ``rank``'s part. All arguments but ``rank`` must be the same on every rank.

    ``order`` are the ranks in the order in which they form the ring; by number if None.
    """
    if size == 1:
        return Schedule("ring", rank, size, element_count, (), Space.INPUT)
    shards = split_evenly(element_count, size)
    order = order or tuple(range(size))
    place = order.index(rank)
    right, left = order[(place + 1) % size], order[(place - 1) % size]
    steps: list[Step] = []
    for turn in range(2 * (size - 1)):
        gathering = turn >= size - 1
        sent = list(segments(*shards[(place - turn) % size], segment_elements))
        received = list(segments(*shards[(place - turn - 1) % size], segment_elements))
        source = Space.INPUT if turn == 0 else Space.WORK
        content = Content.INPUT if turn == 0 else Content.RESULT if gathering else Content.PARTIAL
        # Sends and receives alternate, so that a segment's reduction stands right before it is needed.
        for index in range(max(len(sent), len(received))):
            if index < len(sent):
                number, start, stop = sent[index]
                steps.append(Send(right, start, stop, source, turn, number, content))
            if index < len(received):
                number, start, stop = received[index]
                if gathering:
                    steps.append(Receive(left, start, stop, Space.WORK, turn, number, content))
                else:
                    steps.append(Receive(left, start, stop, Space.SCRATCH, turn, number, content))
                    steps.append(Reduce(left, start, stop, Space.INPUT, finish=turn == size - 2))
    return Schedule("ring", rank, size, element_count, tuple(steps))
