"""Calls in which ranks give, or get, parts: reduce_scatter, all_gather, gather, scatter, all_to_all, send, receive.

Results are new arrays (but for ``scatter`` and ``receive``, which fill the given ones): every array is a vector of its
own, sent from where it lies to where it is returned. Of an array of shape ``(n, …)``, rank ``r``'s part is the ``r``-th
that :func:`numpy.array_split` makes along the first axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import Arrays, ArraysLook, Bucket, Named, check_arrays, is_plain_vector
from sparkle_mesh.collectives.call_identity import CallIdentity, call_identity
from sparkle_mesh.collectives.cost import segment_bytes
from sparkle_mesh.collectives.executor import Lane
from sparkle_mesh.collectives.parts import all_gather, gather, point_to_point, reduce_scatter, scatter
from sparkle_mesh.collectives.plan import cached_plan
from sparkle_mesh.collectives.reduction import Array, Reduction, check_dtype, check_op, work_dtype
from sparkle_mesh.collectives.schedule import Schedule, Space
from sparkle_mesh.errors import UsageError

Allocate = Callable[[int, np.dtype[Any]], Array]


@dataclass(frozen=True, slots=True)
class PartsCall:
    """What the caller of rank ``rank`` of ``size`` asked for, checked."""

    kind: str
    arrays: Arrays
    rank: int
    size: int
    op: str = "sum"
    #: Whose arrays are handed out, or to whom they go.
    root: int | None = None
    #: Of those between two, to whom they go.
    target: int | None = None
    algorithm: str = "pairwise"
    #: Never over shared memory.
    one_sided: bool = False
    #: What is given or gotten depends on how many ranks there are: who calls it must see the next view before.
    repeats: bool = False

    @property
    def look(self) -> ArraysLook:
        """What all ranks must have in common: the form, names, dtypes and shapes of arrays, as all but a root give."""
        look = self.arrays.look
        if self.kind != "scatter" or self.rank != self.root:
            return look
        return look._replace(shapes=tuple(shape[1:] for shape in look.shapes))

    @property
    def identity(self) -> CallIdentity:
        """What all ranks must have in common."""
        return call_identity(self.kind, self.algorithm, False, self.op, self.root, self.look, target=self.target)

    def describe(self) -> str:
        """Return the call for people, of bounded length."""
        return self.identity.description

    def lanes(self, key: bytes, allocate: Allocate) -> tuple[list[Bucket], list[Lane]]:
        """Return what is to be done, and what it is written back into; that is nothing where results are new arrays."""
        if self.target is not None:
            return self._point_to_point(key, allocate)
        reduction = Reduction(self.op, self.size)
        lanes: list[Lane] = []
        for given in self.arrays.values:
            dtype = given.dtype.newbyteorder("<")
            source = given.reshape(-1) if is_plain_vector(given) else given.astype(dtype, order="C").reshape(-1)
            for schedule, *arguments in self._schedules(given):
                plan = cached_plan(False, schedule, self.rank, self.size, *arguments)
                low, high = plan.schedule.work_range
                work = np.empty(high - low, work_dtype(dtype) if self.kind == "reduce_scatter" else dtype)
                start, stop = plan.schedule.input_range
                lanes.append(Lane(plan, source[: stop - start], work, reduction, key))
        return [], lanes

    def _point_to_point(self, key: bytes, allocate: Allocate) -> tuple[list[Bucket], list[Lane]]:
        """From one rank to another all arrays of a dtype go as one vector."""
        sends = self.rank == self.root
        buckets = self.arrays.buckets(allocate, fill=sends)
        lanes = []
        for bucket in buckets:
            count, dtype = bucket.data.size, bucket.data.dtype
            segment = max(segment_bytes(bucket.data.nbytes, 1) // dtype.itemsize, 1)
            plan = cached_plan(False, point_to_point, self.rank, self.size, count, segment, self.root, self.target)
            source, work = (bucket.data, bucket.data[:0]) if sends else (bucket.data[:0], allocate(count, dtype))
            lanes.append(Lane(plan, source, work, Reduction(self.op, self.size), key))
        return ([] if sends else buckets), lanes

    def _schedules(self, given: Array) -> list[tuple[Any, ...]]:
        """The schedules over one array: with the elements, those of a segment, and what else each needs."""
        size, count = self.size, given.size
        makers: dict[str, Callable[..., Schedule]] = {
            "reduce_scatter": reduce_scatter,
            "all_gather": all_gather,
            "gather": gather,
        }
        if self.kind == "reduce_scatter":
            parts = split_rows(given.shape, size)
        else:
            each = count // size if self._gives_all else count
            count = each * size
            parts = tuple((rank * each, (rank + 1) * each) for rank in range(size))
        segment = max(segment_bytes(count // size * given.itemsize, 1) // given.itemsize, 1)
        roots = () if self.root is None else (self.root,)
        if self.kind == "all_to_all":
            return [(scatter, count, segment, root, parts) for root in range(size)]
        return [(makers.get(self.kind, scatter), count, segment, *roots, parts)]

    @property
    def _gives_all(self) -> bool:
        """Whether this rank's array has a row for each rank."""
        return self.kind == "all_to_all" or (self.kind == "scatter" and self.rank == self.root)

    def result(self, lanes: list[Lane]) -> Any:
        """Return what the caller gets, in the form in which it gave its arrays."""
        each = self.size if self.kind == "all_to_all" else 1
        made = [
            self._made(given, lanes[number * each : (number + 1) * each])
            for number, given in enumerate(self.arrays.values)
        ]
        if self.arrays.form == "array":
            return made[0]
        if self.arrays.form == "dict":
            return dict(zip(self.arrays.look.names, made, strict=True))
        return made

    def _made(self, given: Array, lanes: list[Lane]) -> Array | None:
        lane = lanes[0]
        # Alone, a rank's sum is what it gave.
        work = lane.work if lane.plan.schedule.result is not Space.INPUT else lane.source.copy()
        match self.kind:
            case "reduce_scatter":
                low, high = row_range(given.shape[0], self.size, self.rank)
                return work.astype(given.dtype, copy=False).reshape(high - low, *given.shape[1:])
            case "gather" if self.rank != self.root:
                return None
            case "all_gather" | "gather":
                return work.reshape(self.size, *given.shape)
            case "all_to_all":
                return np.concatenate([lane.work for lane in lanes]).reshape(given.shape)
            case _ if self.rank == self.root:
                row: Array = given[self.rank]
                return row
            case _:
                given[...] = work.reshape(given.shape)
                return given


def row_range(rows: int, size: int, rank: int) -> tuple[int, int]:
    """Return the rows of ``rank``, as :func:`numpy.array_split` cuts them."""
    each, more = divmod(rows, size)
    low = rank * each + min(rank, more)
    return low, low + each + (rank < more)


def split_rows(shape: tuple[int, ...], size: int) -> tuple[tuple[int, int], ...]:
    """Return every rank's range of elements of a flat array of ``shape``."""
    row = int(np.prod(shape[1:]))
    return tuple((low * row, high * row) for low, high in (row_range(shape[0], size, rank) for rank in range(size)))


def check_root(root: object, size: int) -> int:
    """Return ``root`` if it is a rank. Raises UsageError."""
    return check_rank("root", root, size)


def check_other(name: str, other: object, rank: int, size: int) -> int:
    """Return ``other``, the argument called ``name``, if it is a rank but not ``rank``. Raises UsageError."""
    place = check_rank(name, other, size)
    if place == rank:
        raise UsageError(f"{name} {place} is this rank; give another, of 0 to {size - 1}")
    return place


def check_rank(name: str, rank: object, size: int) -> int:
    """Return ``rank``, the argument called ``name``, if it is one of ``size``. Raises UsageError."""
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 0 <= rank < size:
        raise UsageError(f"{name} {rank!r} is not a rank: there are ranks 0 to {size - 1}")
    return int(rank)


def parts_call(kind: str, data: object, rank: int, size: int, *, op: str = "sum", root: object = None) -> PartsCall:
    """Check the arguments of a collective of parts among ``size`` ranks. Raises UsageError."""
    place = None if root is None else check_root(root, size)

    def check(dtype: np.dtype[Any], label: str) -> None:
        check_dtype(dtype, label)
        check_op(op, dtype, label)

    written = kind == "scatter" and rank != place
    arrays = check_arrays(data, check if kind == "reduce_scatter" else check_dtype, written=written)
    call = PartsCall(kind, arrays, rank, size, op, place)
    for item in arrays.named:
        _check_shape(call, item)
    vectors = len(arrays.values) * (size if kind == "all_to_all" else 1)
    if vectors > limits.COLLECTIVE_LANES_MAX_COUNT:
        raise UsageError(
            f"{kind} of {len(arrays.values)} arrays among {size} ranks makes {vectors} vectors, which is over"
            f" {limits.COLLECTIVE_LANES_MAX_COUNT}; make several calls"
        )
    return call


def point_to_point_call(kind: str, data: object, rank: int, size: int, source: int, target: int) -> PartsCall:
    """Check the array that ``rank``, one of the two, gives to ``send`` or ``receive``. Raises UsageError."""
    arrays = check_arrays(data, check_dtype, written=rank == target)
    return PartsCall(kind, arrays, rank, size, root=source, target=target)


def _check_shape(call: PartsCall, item: Named) -> None:
    shape = item.array.shape
    if call.kind == "reduce_scatter" and not shape:
        raise UsageError(f"{item.label} has no first axis to be split along; pass one of at least one dimension")
    if call._gives_all and (not shape or shape[0] != call.size):
        raise UsageError(
            f"{item.label} is of shape {shape}; {call.kind} needs a first axis of {call.size}: a part for each rank"
        )
