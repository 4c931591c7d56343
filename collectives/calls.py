"""What a caller asked for, once checked, and the plan that carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.algorithms import SCHEDULES, streams, ways_told
from sparkle_mesh.collectives.arrays import NO_ARRAYS, Arrays, ArraysLook, check_arrays
from sparkle_mesh.collectives.broadcast import chain_broadcast, tree_broadcast
from sparkle_mesh.collectives.call_identity import SHARED, CallIdentity, call_identity
from sparkle_mesh.collectives.compression import Compression, check_compression
from sparkle_mesh.collectives.cost import butterfly_segment, choose_algorithm, segment_bytes
from sparkle_mesh.collectives.parts_call import check_root
from sparkle_mesh.collectives.plan import Plan, cached_plan
from sparkle_mesh.collectives.reduction import check_dtype, check_op
from sparkle_mesh.collectives.rooted import chain_reduce, tree_reduce
from sparkle_mesh.collectives.schedule import Schedule
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.errors import UsageError

_BROADCAST: dict[str, Callable[..., Schedule]] = {"chain": chain_broadcast, "binary_tree": tree_broadcast}
_REDUCE: dict[str, Callable[..., Schedule]] = {"chain": chain_reduce, "binary_tree": tree_reduce}


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
    #: How numbers are sent; as they are if None.
    compression: Compression | None = None
    #: What the op is called for people, if it is not ``op``.
    label: str = ""
    #: What the caller gave, if it is not ``arrays``.
    given: ArraysLook | None = None
    #: Whether it is made again if its view ends before it does.
    repeats: bool = True
    #: What else all ranks must have in common, for people.
    terms: str = ""

    @property
    def identity(self) -> CallIdentity:
        """What all ranks must have in common."""
        compression = "" if self.compression is None else self.compression.describe()
        return call_identity(
            self.kind,
            self.algorithm,
            self.one_sided,
            self.label or self.op,
            self.root,
            self.given or self.arrays.look,
            compression,
            terms=self.terms,
        )

    def describe(self) -> str:
        """Return the call for people, of bounded length."""
        return self.identity.description

    def plan(self, rank: int, topology: Topology, count: int, item_bytes: int, in_place: bool) -> Plan:
        """Return ``rank``'s plan for a vector of ``count`` elements of ``item_bytes`` each, within its staging or not.

        An algorithm that could not overwrite its input is not asked to.
        """
        size, nbytes = topology.size, count * item_bytes
        algorithm = "direct" if self.kind == "barrier" else self.algorithm
        if algorithm == "butterfly":
            segment = butterfly_segment(nbytes, topology)
        else:
            segment = segment_bytes(nbytes, streams(algorithm, topology))
        elements = max(segment // item_bytes, 1)
        if self.root is not None:
            schedule = (_REDUCE if self.kind == "reduce" else _BROADCAST)[algorithm]
            return cached_plan(False, schedule, rank, size, count, elements, self.root)
        told = ways_told(algorithm, topology, count)
        return cached_plan(in_place and algorithm != "direct", SCHEDULES[algorithm], rank, size, count, elements, *told)


def all_reduce_call(
    data: object, op: str, algorithm: str, topology: Topology, compression: object = None, beside: int = 0
) -> Call:
    """Check the arguments of an all-reduce among the ranks of ``topology``. Raises UsageError.

    The last ``beside`` arrays are not compressed.
    """

    def check(dtype: np.dtype[Any], label: str) -> None:
        check_dtype(dtype, label)
        check_op(op, dtype, label)

    check_op(op, np.dtype(np.float32), "the data")
    arrays = check_arrays(data, check)
    if algorithm == SHARED and compression is None:
        return Call("all_reduce", SHARED, arrays, op, one_sided=True)
    packing = check_compression(compression, arrays, op, algorithm, topology, beside)
    if packing is not None:
        return Call("all_reduce", "butterfly", arrays, op, compression=packing)
    chosen = choose_algorithm(arrays.nbytes, topology, asked=algorithm)
    return Call("all_reduce", chosen, arrays, op, one_sided=algorithm == "auto")


def reduce_call(data: object, op: str, root: object, rank: int, topology: Topology) -> Call:
    """Check the arguments that ``rank`` gives a reduction to one rank. Raises UsageError."""
    place = check_root(root, topology.size)

    def check(dtype: np.dtype[Any], label: str) -> None:
        check_dtype(dtype, label)
        check_op(op, dtype, label)

    check_op(op, np.dtype(np.float32), "the data")
    arrays = check_arrays(data, check, written=rank == place)
    return Call("reduce", choose_algorithm(arrays.nbytes, topology, kind="reduce"), arrays, op, root=place)


def broadcast_call(data: object, root: object, rank: int, topology: Topology) -> Call:
    """Check the arguments that ``rank`` gives a broadcast among the ranks of ``topology``. Raises UsageError."""
    place = check_root(root, topology.size)
    arrays = check_arrays(data, check_dtype, written=rank != place)
    return Call("broadcast", choose_algorithm(arrays.nbytes, topology, kind="broadcast"), arrays, root=place)


def barrier_call() -> Call:
    """Return the call of a barrier: an operation without data."""
    return Call("barrier", "direct", NO_ARRAYS, one_sided=True)


def check_tag(tag: object) -> str:
    """Return ``tag``, "" for None. Raises UsageError."""
    if tag is None:
        return ""
    if not isinstance(tag, str) or not 0 < len(tag) <= limits.NAME_MAX_CHARS:
        raise UsageError(f"tag is {tag!r}; give a text of 1 to {limits.NAME_MAX_CHARS} characters, or None")
    try:
        tag.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"tag {tag!r} holds half a character (a lone surrogate), which cannot be sent") from error
    return tag


def check_terms(on_failure: object, min_contributors: object) -> tuple[bool, int | None, str]:
    """Return whether a call is made again, the least number of ranks, and both for people, "" if they are as usual.

    Raises
    ------
    UsageError
    """
    if on_failure not in ("retry", "raise"):
        raise UsageError(f"on_failure is {on_failure!r}; it must be 'retry' or 'raise'")
    least = min_contributors
    if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 1):
        raise UsageError(f"min_contributors is {least!r}; give the least number of ranks, or None")
    said = [f"on_failure={on_failure!r}"] if on_failure != "retry" else []
    said += [f"min_contributors={least}"] if least is not None else []
    return on_failure == "retry", least, ", ".join(said)


def check_timeout(timeout_s: Any) -> float:
    """Return the seconds that a call may take, ``limits.COLLECTIVE_TIMEOUT_S`` for None. Raises UsageError."""
    if timeout_s is None:
        return limits.COLLECTIVE_TIMEOUT_S
    seconds = float(timeout_s) if isinstance(timeout_s, Real) and not isinstance(timeout_s, bool) else 0.0
    if not 0 < seconds <= limits.TIMEOUT_MAX_S:
        raise UsageError(
            f"timeout_s is {timeout_s!r}; it must be positive and at most {limits.TIMEOUT_MAX_S:g} seconds"
        )
    return seconds
