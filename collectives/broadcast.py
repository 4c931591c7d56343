"""Pipelined broadcast: segments flow down a binary tree, or along a chain.

The chain sends every byte once per link and is the fastest for much data over few ranks; the binary tree reaches
``n`` ranks in ``log2 n`` hops but its inner nodes send everything twice.

Source: the standard pipelined trees; see P. Sanders, J. Speck, J. L. Träff, Parallel Computing 35 (2009), section 2.
"""

from __future__ import annotations

from sparkle_mesh.collectives.schedule import Content, Receive, Schedule, Send, Space, Step, segments


def _schedule(
    algorithm: str, rank: int, size: int, element_count: int, segment_elements: int, root: int, fan_out: int
) -> Schedule:
    place = (rank - root) % size
    below = [
        (child + root) % size for child in range(place * fan_out + 1, place * fan_out + fan_out + 1) if child < size
    ]
    space = Space.WORK if place else Space.INPUT
    steps: list[Step] = []
    for number, start, stop in segments(0, element_count, segment_elements):
        if place:
            steps.append(
                Receive(((place - 1) // fan_out + root) % size, start, stop, Space.WORK, 0, number, Content.RESULT)
            )
        steps.extend(Send(child, start, stop, space, 0, number, Content.RESULT) for child in below)
    return Schedule(algorithm, rank, size, element_count, tuple(steps), space)


def chain_broadcast(rank: int, size: int, element_count: int, segment_elements: int, root: int = 0) -> Schedule:
    """Return ``rank``'s part of a broadcast from ``root`` along the ring's order."""
    return _schedule("chain", rank, size, element_count, segment_elements, root, 1)


def tree_broadcast(rank: int, size: int, element_count: int, segment_elements: int, root: int = 0) -> Schedule:
    """Return ``rank``'s part of a broadcast from ``root`` down a binary tree."""
    return _schedule("binary_tree", rank, size, element_count, segment_elements, root, 2)
