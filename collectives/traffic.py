"""What an all-reduce sends from host to host, taken from its very schedules: what lines between hosts carry."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from sparkle_mesh import limits
from sparkle_mesh.collectives.algorithms import SCHEDULES, ways_told
from sparkle_mesh.collectives.schedule import Send
from sparkle_mesh.collectives.topology import Topology

# So many elements per rank that cuts of them are exact enough.
_ELEMENTS_PER_RANK: Final = 1024


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
    if topology.host_count == 1:
        return (0.0,) * size
    if size > limits.TRAFFIC_RANKS_MAX_COUNT:
        return None
    count = size * _ELEMENTS_PER_RANK
    out, into = dict.fromkeys(hosts, 0), dict.fromkeys(hosts, 0)
    told = ways_told(algorithm, topology, count)
    for rank in range(size):
        for step in SCHEDULES[algorithm](rank, size, count, count, *told).steps:
            if isinstance(step, Send) and hosts[step.peer] != hosts[rank]:
                out[hosts[rank]] += step.stop - step.start
                into[hosts[step.peer]] += step.stop - step.start
    return tuple(max(out[host], into[host]) / count for host in hosts)
