"""Reduce to one rank: up a pipelined chain, or up a binary tree.

The chain sends every element once over every link, and no rank receives more than one vector: the best for much data.
The tree takes ``log2(size)`` hops, and its inner ranks receive two vectors.

Source: the standard pipelined trees; see P. Sanders, J. Speck, J. L. Träff, Parallel Computing 35 (2009), section 2.
"""

from __future__ import annotations

from sparkle_mesh.collectives.schedule import Content, Receive, Reduce, Schedule, Send, Space, Step, segments


def _schedule(
    algorithm: str, rank: int, size: int, element_count: int, segment_elements: int, root: int, fan_in: int
) -> Schedule:
    if size == 1:
        return Schedule(algorithm, rank, size, element_count, (), Space.INPUT, replicated=False)
    place = (rank - root) % size

    def children(of: int) -> list[int]:
        return [child for child in range(of * fan_in + 1, of * fan_in + fan_in + 1) if child < size]

    below = sorted(((child + root) % size, bool(children(child))) for child in children(place))
    parent = ((place - 1) // fan_in + root) % size if place else None
    steps: list[Step] = []
    for number, start, stop in segments(0, element_count, segment_elements):
        for order, (child, inner) in enumerate(below):
            content = Content.PARTIAL if inner else Content.INPUT
            steps.append(Receive(child, start, stop, Space.SCRATCH, 0, number, content))
            finish = parent is None and order == len(below) - 1
            steps.append(Reduce(child, start, stop, Space.WORK if order else Space.INPUT, finish))
        if parent is not None:
            source, content = (Space.WORK, Content.PARTIAL) if below else (Space.INPUT, Content.INPUT)
            steps.append(Send(parent, start, stop, source, 0, number, content))
    return Schedule(
        algorithm,
        rank,
        size,
        element_count,
        tuple(steps),
        Space.WORK if parent is None else None,
        holds=None if below else (0, 0),
        replicated=False,
    )


def chain_reduce(rank: int, size: int, element_count: int, segment_elements: int, root: int = 0) -> Schedule:
    """Return ``rank``'s part of a reduction to ``root`` along the ring's order."""
    return _schedule("chain", rank, size, element_count, segment_elements, root, 1)


def tree_reduce(rank: int, size: int, element_count: int, segment_elements: int, root: int = 0) -> Schedule:
    """Return ``rank``'s part of a reduction to ``root`` up a binary tree."""
    return _schedule("binary_tree", rank, size, element_count, segment_elements, root, 2)
