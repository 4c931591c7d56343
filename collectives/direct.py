"""Direct all-reduce: every rank sends all it has to every other, and adds up what comes.

One hop instead of a ring's ``2 (size - 1)`` or a tree's ``2 log2(size)``, for ``size - 1`` times the bytes: for small
vectors, whose time is that of messages and not of bytes. All ranks add in the order of the ranks, so that all get the
same bits.

Source: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH",
Int. J. High Perform. Comput. Appl. 19 (2005), section 2 (the pairwise exchange of an all-to-all broadcast).
"""

from __future__ import annotations

from sparkle_mesh.collectives.schedule import (
    Accumulate,
    Content,
    Receive,
    Reduce,
    Schedule,
    Send,
    Space,
    Step,
    segments,
)


def direct_all_reduce(rank: int, size: int, element_count: int, segment_elements: int) -> Schedule:
    """Return ``rank``'s part. All arguments but ``rank`` must be the same on every rank."""
    if size == 1:
        return Schedule("direct", rank, size, element_count, (), Space.INPUT)
    steps: list[Step] = []
    cut = list(segments(0, element_count, segment_elements))
    # Each begins with its neighbour, so that not all send to the same one first.
    others = [(rank + turn) % size for turn in range(1, size)]
    for number, start, stop in cut:
        steps.extend(Send(peer, start, stop, Space.INPUT, 0, number, Content.INPUT) for peer in others)
    # The ranks 0 and 1 begin with the sum of both; the others with what rank 0 has sent.
    order = [1 - rank, *range(2, size)] if rank < 2 else list(range(size))
    for number, start, stop in cut:
        for peer in order:
            finish = peer == order[-1]
            if peer == rank:
                steps.append(Accumulate(start, stop, finish))
            elif rank >= 2 and peer == 0:
                steps.append(Receive(peer, start, stop, Space.WORK, 0, number, Content.INPUT))
            else:
                operand = Space.INPUT if peer == 1 - rank else Space.WORK
                steps.append(Receive(peer, start, stop, Space.SCRATCH, 0, number, Content.INPUT))
                steps.append(Reduce(peer, start, stop, operand, finish, received_first=rank == 1 and peer == 0))
    return Schedule("direct", rank, size, element_count, tuple(steps))
