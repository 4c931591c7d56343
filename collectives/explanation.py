"""What a collective of some size would do, and why."""

from __future__ import annotations

from dataclasses import dataclass

from sparkle_mesh.collectives.call_identity import SHARED
from sparkle_mesh.collectives.cost import predictions, shared_s
from sparkle_mesh.collectives.topology import Topology


@dataclass(frozen=True)
class Explanation:
    """How ``all_reduce`` of an array of ``nbytes`` would be done with ``algorithm="auto"``; ``print`` it.

    Attributes
    ----------
    nbytes
        Of one rank's array.
    algorithm
        What would be chosen.
    predicted_s
        Seconds that each algorithm is predicted to take, the shortest first.
    shares
        What part of the array each rank would own in ``"butterfly"``.
    ring_order
        The ranks in the order of ``"ring"``.
    lines_bytes_per_s
        What each rank's line was measured to carry.
    hosts
        Per rank, a number that ranks of one host have in common.
    """

    nbytes: int
    algorithm: str
    predicted_s: dict[str, float]
    shares: tuple[float, ...]
    ring_order: tuple[int, ...]
    lines_bytes_per_s: tuple[float, ...]
    hosts: tuple[int, ...]

    def __str__(self) -> str:
        lines = [f"all_reduce of {self.nbytes} bytes over {len(self.shares)} ranks: {self.algorithm}", ""]
        lines.append(f"  {'algorithm':<18}{'predicted':>12}")
        for name, seconds in self.predicted_s.items():
            chosen = "  <- chosen" if name == self.algorithm else ""
            lines.append(f"  {name:<18}{seconds * 1e3:>9.2f} ms{chosen}")
        lines += ["", f"  {'rank':<6}{'host':>6}{'line':>14}{'share':>9}"]
        for rank, (host, line, share) in enumerate(zip(self.hosts, self.lines_bytes_per_s, self.shares, strict=True)):
            lines.append(f"  {rank:<6}{host:>6}{line / 1e6:>9.1f} MB/s{share:>9.1%}")
        lines.append(f"  ring: {' '.join(map(str, self.ring_order))}")
        return "\n".join(lines)


def explain(nbytes: int, topology: Topology, *, shared: bool) -> Explanation:
    """Explain an all-reduce of ``nbytes``; ``shared`` says whether all ranks share memory."""
    found = predictions(nbytes, topology)
    chosen = SHARED if shared else next(iter(found))
    if shared:
        found = dict(sorted({**found, SHARED: shared_s(nbytes, topology)}.items(), key=lambda item: item[1]))
    return Explanation(nbytes, chosen, found, topology.shares, topology.ring_order, topology.lines, topology.host_of)
