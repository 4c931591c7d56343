"""Collectives in which ranks give, or end with, parts of a vector: reduce-scatter, all-gather, gather and scatter.

All go straight from whoever has a part to whoever is to have it: every byte once over one link, in one hop. ``parts``
are the ranges of the ranks. An all-to-all is one scatter per rank.

Source: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH",
Int. J. High Perform. Comput. Appl. 19 (2005), sections 4.1 and 4.3 (pairwise exchange).
"""

from __future__ import annotations

from sparkle_mesh.collectives.butterfly import Shards, gather_steps, reduce_steps, scatter_steps
from sparkle_mesh.collectives.schedule import (
    Content,
    Copy,
    Receive,
    Schedule,
    Send,
    Space,
    Step,
    segments,
)


def reduce_scatter(rank: int, size: int, element_count: int, segment_elements: int, parts: Shards) -> Schedule:
    """Return ``rank``'s part: it ends with the sum of its own range. Sends ``(size - 1) / size`` of the vector."""
    if size == 1:
        return Schedule("pairwise", rank, size, element_count, (), Space.INPUT, replicated=False)
    cuts = [list(segments(*part, segment_elements)) for part in parts]
    steps = scatter_steps(rank, cuts, Space.INPUT, Content.INPUT, 0)
    steps += reduce_steps(rank, cuts[rank], [peer for peer in range(size) if peer != rank])
    return Schedule("pairwise", rank, size, element_count, tuple(steps), holds=parts[rank], replicated=False)


def all_gather(rank: int, size: int, element_count: int, segment_elements: int, parts: Shards) -> Schedule:
    """Return ``rank``'s part: it gives its own range and ends with all. Sends its range ``size - 1`` times."""
    cuts = [list(segments(*part, segment_elements)) for part in parts]
    steps: list[Step] = [Copy(start, stop) for _, start, stop in cuts[rank]]
    steps += gather_steps(rank, cuts, 0)
    return Schedule("pairwise", rank, size, element_count, tuple(steps), gives=parts[rank])


def gather(rank: int, size: int, element_count: int, segment_elements: int, root: int, parts: Shards) -> Schedule:
    """Return ``rank``'s part: it gives its own range; ``root`` ends with all."""
    cuts = [list(segments(*part, segment_elements)) for part in parts]
    steps: list[Step] = []
    if rank != root:
        steps += [Send(root, low, high, Space.INPUT, 0, n, Content.RESULT) for n, low, high in cuts[rank]]
    else:
        steps += [Copy(low, high) for _, low, high in cuts[rank]]
        for index in range(max(map(len, cuts))):
            for peer in (peer for peer in range(size) if peer != root):
                if index < len(cuts[peer]):
                    number, low, high = cuts[peer][index]
                    steps.append(Receive(peer, low, high, Space.WORK, 0, number, Content.RESULT))
    return Schedule(
        "pairwise",
        rank,
        size,
        element_count,
        tuple(steps),
        gives=parts[rank],
        holds=(0, element_count) if rank == root else (0, 0),
        replicated=False,
    )


def point_to_point(
    rank: int, size: int, element_count: int, segment_elements: int, source: int, target: int
) -> Schedule:
    """Return ``rank``'s part: ``target`` gets the vector that ``source`` gives."""
    parts = tuple((0, element_count if other == target else 0) for other in range(size))
    return scatter(rank, size, element_count, segment_elements, source, parts)


def scatter(rank: int, size: int, element_count: int, segment_elements: int, root: int, parts: Shards) -> Schedule:
    """Return ``rank``'s part: ``root`` gives the vector; each ends with its own range."""
    cuts = [list(segments(*part, segment_elements)) for part in parts]
    steps: list[Step] = []
    if rank == root:
        steps += scatter_steps(rank, cuts, Space.INPUT, Content.RESULT, 0)
        steps += [Copy(low, high) for _, low, high in cuts[rank]]
    else:
        steps += [Receive(root, low, high, Space.WORK, 0, n, Content.RESULT) for n, low, high in cuts[rank]]
    return Schedule(
        "pairwise",
        rank,
        size,
        element_count,
        tuple(steps),
        gives=(0, element_count) if rank == root else (0, 0),
        holds=parts[rank],
        replicated=False,
    )
