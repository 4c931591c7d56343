"""What a caller asked for, once checked, and the plan that carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import Arrays, ArraysLook, check_arrays
from sparkle_mesh.collectives.broadcast import chain_broadcast, tree_broadcast
from sparkle_mesh.collectives.cost import choose_algorithm, segment_bytes
from sparkle_mesh.collectives.direct import direct_all_reduce
from sparkle_mesh.collectives.messages import call_digest
from sparkle_mesh.collectives.plan import Plan, cached_plan
from sparkle_mesh.collectives.reduction import check_dtype, check_op
from sparkle_mesh.collectives.ring import ring_all_reduce
from sparkle_mesh.collectives.schedule import Schedule
from sparkle_mesh.collectives.tree import tree_all_reduce
from sparkle_mesh.errors import UsageError

# Into how many streams an algorithm divides a vector, for choosing the size of segments.
_STREAMS: dict[str, Callable[[int], int]] = {"ring": lambda size: size, "tree": lambda _: 2}
#: The algorithm that is done one-sided or not at all.
SHARED = "shared"
_ALGORITHMS: dict[str, Callable[..., Schedule]] = {
    "ring": ring_all_reduce,
    "tree": tree_all_reduce,
    "direct": direct_all_reduce,
    "chain": chain_broadcast,
    "binary_tree": tree_broadcast,
}


class CallIdentity(NamedTuple):
    """Equal calls have equal digests; the description is for people, of bounded length."""

    digest: bytes
    description: str


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def _identity(kind: str, algorithm: str, one_sided: bool, op: str, root: int | None, look: ArraysLook) -> CallIdentity:
    # Training repeats the same few calls over and over.
    match kind:
        case "all_reduce":
            shown = "auto" if one_sided and algorithm != SHARED else algorithm
            text = f"all_reduce({look.describe()}, op={op!r}, algorithm={shown!r})"
        case "broadcast":
            text = f"broadcast({look.describe()}, root={root})"
        case _:
            text = "barrier()"
    limit = limits.COLLECTIVE_DESCRIPTION_MAX_CHARS
    digest = call_digest((1, kind, algorithm, one_sided, op, root, look.signature()))
    return CallIdentity(digest, text if len(text) <= limit else text[: limit - 1] + "…")


@dataclass(frozen=True, slots=True)
class Call:
    """What the caller asked for, checked."""

    kind: str
    algorithm: str
    arrays: Arrays
    op: str = "sum"
    root: int | None = None
    #: Whether it is done one-sided where the ranks share memory.
    one_sided: bool = False

    @property
    def identity(self) -> CallIdentity:
        """What all ranks must have in common."""
        return _identity(self.kind, self.algorithm, self.one_sided, self.op, self.root, self.arrays.look)

    def describe(self) -> str:
        """Return the call for people, of bounded length."""
        return self.identity.description

    def plan(self, rank: int, size: int, count: int, item_bytes: int) -> Plan:
        """Return ``rank``'s plan for a vector of ``count`` elements of ``item_bytes`` each."""
        streams = _STREAMS[self.algorithm](size) if self.algorithm in _STREAMS else 1
        segment = max(segment_bytes(count * item_bytes, streams) // item_bytes, 1)
        root = () if self.root is None else (self.root,)
        return cached_plan(_ALGORITHMS[self.algorithm], rank, size, count, segment, *root)


def all_reduce_call(data: object, op: str, algorithm: str, size: int) -> Call:
    """Check the arguments of an all-reduce among ``size`` ranks. Raises UsageError."""

    def check(dtype: np.dtype[Any], label: str) -> None:
        check_dtype(dtype, label)
        check_op(op, dtype, label)

    check_op(op, np.dtype(np.float32), "the data")
    arrays = check_arrays(data, check)
    if algorithm == SHARED:
        return Call("all_reduce", SHARED, arrays, op, one_sided=True)
    chosen = choose_algorithm(arrays.nbytes, size, asked=algorithm)
    return Call("all_reduce", chosen, arrays, op, one_sided=algorithm == "auto")


def broadcast_call(data: object, root: object, rank: int, size: int) -> Call:
    """Check the arguments that ``rank`` gives a broadcast among ``size`` ranks. Raises UsageError."""
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < size:
        raise UsageError(f"root {root!r} is not a rank: there are ranks 0 to {size - 1}")
    arrays = check_arrays(data, check_dtype, written=rank != root)
    return Call("broadcast", choose_algorithm(arrays.nbytes, size, kind="broadcast"), arrays, root=root)


def barrier_call() -> Call:
    """Return the call of a barrier: an operation without data."""
    return Call("barrier", "direct", Arrays("list", ()), one_sided=True)


def check_timeout(timeout_s: object) -> float:
    """Return the seconds that a call may take, ``limits.COLLECTIVE_TIMEOUT_S`` for None. Raises UsageError."""
    if timeout_s is None:
        return limits.COLLECTIVE_TIMEOUT_S
    if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s <= limits.TIMEOUT_MAX_S:
        raise UsageError(
            f"timeout_s is {timeout_s!r}; it must be positive and at most {limits.TIMEOUT_MAX_S:g} seconds"
        )
    return timeout_s
