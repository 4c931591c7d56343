"""What a caller asked for, once checked, and the plan that carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import Arrays
from sparkle_mesh.collectives.broadcast import chain_broadcast, tree_broadcast
from sparkle_mesh.collectives.cost import segment_bytes
from sparkle_mesh.collectives.plan import Plan, cached_plan
from sparkle_mesh.collectives.ring import ring_all_reduce
from sparkle_mesh.collectives.schedule import Schedule
from sparkle_mesh.collectives.tree import tree_all_reduce

# Into how many streams an algorithm divides a vector, for choosing the size of segments.
_STREAMS: dict[str, Callable[[int], int]] = {"ring": lambda size: size, "tree": lambda _: 2}
_ALGORITHMS: dict[str, Callable[..., Schedule]] = {
    "ring": ring_all_reduce,
    "tree": tree_all_reduce,
    "chain": chain_broadcast,
    "binary_tree": tree_broadcast,
}


@dataclass(frozen=True, slots=True)
class Call:
    """What the caller asked for, checked."""

    kind: str
    algorithm: str
    arrays: Arrays
    op: str = "sum"
    root: int | None = None

    def signature(self) -> tuple[object, ...]:
        """Everything that all ranks must have in common."""
        return (1, self.kind, self.algorithm, self.op, self.root, self.arrays.signature())

    def describe(self) -> str:
        """Return the call for people, of bounded length."""
        match self.kind:
            case "all_reduce":
                text = f"all_reduce({self.arrays.describe()}, op={self.op!r}, algorithm={self.algorithm!r})"
            case "broadcast":
                text = f"broadcast({self.arrays.describe()}, root={self.root})"
            case _:
                text = "barrier()"
        limit = limits.COLLECTIVE_DESCRIPTION_MAX_CHARS
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def plan(self, rank: int, size: int, count: int, item_bytes: int) -> Plan:
        """Return ``rank``'s plan for a vector of ``count`` elements of ``item_bytes`` each."""
        streams = _STREAMS[self.algorithm](size) if self.algorithm in _STREAMS else 1
        segment = max(segment_bytes(count * item_bytes, streams) // item_bytes, 1)
        root = () if self.root is None else (self.root,)
        return cached_plan(_ALGORITHMS[self.algorithm], rank, size, count, segment, *root)
