"""The all-reduce algorithms by name: the schedule of each, and what it is told of the ways between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sparkle_mesh.collectives.butterfly import butterfly_all_reduce, split_by_weight
from sparkle_mesh.collectives.direct import direct_all_reduce
from sparkle_mesh.collectives.halving_doubling import halving_doubling_all_reduce
from sparkle_mesh.collectives.hierarchical import hierarchical_all_reduce
from sparkle_mesh.collectives.ring import ring_all_reduce
from sparkle_mesh.collectives.schedule import ALIGN_ELEMENTS, Schedule
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.collectives.tree import tree_all_reduce

#: Called with rank, size, elements, those of a segment, and :func:`ways_told`.
SCHEDULES: Final[dict[str, Callable[..., Schedule]]] = {
    "ring": ring_all_reduce,
    "tree": tree_all_reduce,
    "direct": direct_all_reduce,
    "halving_doubling": halving_doubling_all_reduce,
    "butterfly": butterfly_all_reduce,
    "hierarchical": hierarchical_all_reduce,
}


def ways_told(algorithm: str, topology: Topology, count: int) -> tuple[Any, ...]:
    """Return the last arguments of the algorithm's schedule for a vector of ``count`` elements."""
    match algorithm:
        case "ring":
            return (topology.ring_order,)
        case "hierarchical":
            return (topology.host_of,)
        case "butterfly":
            align = ALIGN_ELEMENTS if count > 64 * topology.size else 1
            return (split_by_weight(count, topology.shares, align),)
        case _:
            return ()


def streams(algorithm: str, topology: Topology) -> int:
    """Return into how many streams the algorithm cuts a vector, each of which flows in segments of its own."""
    return {"ring": topology.size, "tree": 2, "hierarchical": topology.host_count}.get(algorithm, 1)
