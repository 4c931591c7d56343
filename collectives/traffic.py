"""What an all-reduce sends from host to host, taken from its very schedules: what lines between hosts carry."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from sparkle_mesh import limits
from sparkle_mesh.collectives.butterfly import butterfly_all_reduce, split_by_weight
from sparkle_mesh.collectives.direct import direct_all_reduce
from sparkle_mesh.collectives.halving_doubling import halving_doubling_all_reduce
from sparkle_mesh.collectives.hierarchical import hierarchical_all_reduce
from sparkle_mesh.collectives.ring import ring_all_reduce
from sparkle_mesh.collectives.schedule import Schedule, Send
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.collectives.tree import tree_all_reduce

# So many elements per rank that cuts of them are exact enough.
_ELEMENTS_PER_RANK: Final = 1024
_MAKERS: Final[dict[str, Callable[[int, Topology, int], Schedule]]] = {
    "ring": lambda rank, ways, count: ring_all_reduce(rank, ways.size, count, count, ways.ring_order),
    "tree": lambda rank, ways, count: tree_all_reduce(rank, ways.size, count, count),
    "direct": lambda rank, ways, count: direct_all_reduce(rank, ways.size, count, count),
    "halving_doubling": lambda rank, ways, count: halving_doubling_all_reduce(rank, ways.size, count, count),
    "butterfly": lambda rank, ways, count: butterfly_all_reduce(
        rank, ways.size, count, count, split_by_weight(count, ways.shares)
    ),
    "hierarchical": lambda rank, ways, count: hierarchical_all_reduce(rank, ways.size, count, count, ways.host_of),
}


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def crossings(algorithm: str, topology: Topology) -> tuple[float, ...] | None:
    """Return how often the line of each rank's host carries the vector, out or in, whichever is more.

    None where there are too many ranks to look at the schedules of all.

    >>> crossings("hierarchical", Topology(4, hosts=(0, 0, 1, 1)))
    (1.0, 1.0, 1.0, 1.0)
    >>> crossings("ring", Topology(4, hosts=(0, 0, 1, 1)))
    (1.5, 1.5, 1.5, 1.5)
    """
    size, hosts = topology.size, topology.host_of
    if size > limits.TRAFFIC_RANKS_MAX_COUNT:
        return None
    count = size * _ELEMENTS_PER_RANK
    out, into = dict.fromkeys(hosts, 0), dict.fromkeys(hosts, 0)
    for rank in range(size):
        for step in _MAKERS[algorithm](rank, topology, count).steps:
            if isinstance(step, Send) and hosts[step.peer] != hosts[rank]:
                out[hosts[rank]] += step.stop - step.start
                into[hosts[step.peer]] += step.stop - step.start
    return tuple(max(out[host], into[host]) / count for host in hosts)
