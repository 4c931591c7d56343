"""Double binary tree all-reduce: logarithmic latency at (nearly) full bandwidth.

One binary tree uses its links badly: leaves only send, and inner nodes carry everything. Two trees over the
same ranks, each carrying half of the vector, in which whoever is an inner node of one is a leaf of the other,
use every rank's link evenly. Each tree reduces segments upwards and sends finished ones back down; the two
directions overlap, a few segments apart.

The first tree is the in-order one over positions ``1..size``: odd positions are leaves, the parent of ``v`` with
lowest set bit ``b`` is ``v ± b``. The second is its mirror image for an even size and is shifted by one for an odd
one, which makes odd positions inner nodes.

Source: P. Sanders, J. Speck, J. L. Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and
scan", Parallel Computing 35 (2009), sections 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class TreeNode:
    """A rank's place in one tree: its parent (None at the root) and its children in reduction order."""

    parent: int | None
    children: tuple[int, ...]


def _in_order_parent(position: int, size: int) -> int | None:
    bit = position & -position
    parent = (position ^ bit) | (bit << 1)
    if parent > size:
        parent = position ^ bit
    return parent or None


def binary_trees(size: int) -> tuple[list[TreeNode], list[TreeNode]]:
    """Return both trees, each a list of nodes by rank."""
    shift_or_mirror = [(size - 1 - rank) if size % 2 == 0 else (rank + 1) % size for rank in range(size)]
    return _tree(size, list(range(size))), _tree(size, shift_or_mirror)


def _tree(size: int, index_of_rank: list[int]) -> list[TreeNode]:
    rank_at = {index: rank for rank, index in enumerate(index_of_rank)}
    parents: list[int | None] = [None] * size
    children: list[list[int]] = [[] for _ in range(size)]
    for index in range(size):
        above = _in_order_parent(index + 1, size)
        if above is not None:
            parents[rank_at[index]] = rank_at[above - 1]
            children[rank_at[above - 1]].append(rank_at[index])
    # In the order of ranks: where several operations are in flight, links then never wait for each other in a circle.
    return [TreeNode(parent, tuple(sorted(below))) for parent, below in zip(parents, children, strict=True)]


def tree_height(size: int) -> int:
    """Return the number of links on the longest way from a leaf to the root of either tree."""
    return max(size - 1, 0).bit_length()


def tree_all_reduce(rank: int, size: int, element_count: int, segment_elements: int) -> Schedule:
    """Return ``rank``'s part. All arguments but ``rank`` must be the same on every rank."""
    if size == 1:
        return Schedule("tree", rank, size, element_count, (), Space.INPUT)
    halves = [list(segments(*half, segment_elements)) for half in split_evenly(element_count, 2)]
    trees = binary_trees(size)
    nodes = [tree[rank] for tree in trees]
    leaves = [frozenset(r for r, node in enumerate(tree) if not node.children) for tree in trees]
    # A segment comes down this many slots after it went up. Where a pair of ranks meets in both trees, its link
    # carries both directions; all ranks order by (slot, direction, tree), so no two can wait for each other.
    lag = tree_height(size)
    steps: list[Step] = []
    for slot in range(max(len(half) for half in halves) + lag):
        for tree, node in enumerate(nodes):
            if slot < len(halves[tree]):
                steps.extend(_upwards(node, leaves[tree], tree, *halves[tree][slot]))
        for tree, node in enumerate(nodes):
            if 0 <= slot - lag < len(halves[tree]):
                steps.extend(_downwards(node, 2 + tree, *halves[tree][slot - lag]))
    return Schedule("tree", rank, size, element_count, tuple(steps))


def _upwards(node: TreeNode, leaves: frozenset[int], turn: int, number: int, start: int, stop: int) -> list[Step]:
    steps: list[Step] = []
    for order, child in enumerate(node.children):
        content = Content.INPUT if child in leaves else Content.PARTIAL
        steps.append(Receive(child, start, stop, Space.SCRATCH, turn, number, content))
        finish = node.parent is None and order == len(node.children) - 1
        steps.append(Reduce(child, start, stop, Space.WORK if order else Space.INPUT, finish))
    if node.parent is not None:
        source, content = (Space.WORK, Content.PARTIAL) if node.children else (Space.INPUT, Content.INPUT)
        steps.append(Send(node.parent, start, stop, source, turn, number, content))
    return steps


def _downwards(node: TreeNode, turn: int, number: int, start: int, stop: int) -> list[Step]:
    steps: list[Step] = []
    if node.parent is not None:
        steps.append(Receive(node.parent, start, stop, Space.WORK, turn, number, Content.RESULT))
    steps.extend(Send(child, start, stop, Space.WORK, turn, number, Content.RESULT) for child in node.children)
    return steps
