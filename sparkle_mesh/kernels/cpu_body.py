"""Elementwise work, made ready to be done piece by piece: calls into NumPy between small buffers that are used again.

A body becomes a list of calls, each from some places of a list of arrays to one place of it. Places hold pieces of what
is read, numbers that are the same everywhere (computed once per run), pieces of the results, and buffers. Buffers are
given to values by a linear scan: one whose value has been needed for the last time is the next one's, and often the
result of the very operation that needed it last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.kernels.cpu_tiles import Access, Array, Blocks, Piece
from sparkle_mesh.kernels.ops import OPS, Shape, element_strides
from sparkle_mesh.kernels.program import Body, Instruction, collapse

# Of caches and vector registers: buffers begin with a line.
_LINE_BYTES = 64

#: A function that writes to ``out``; what picks its operands out of the places; the place of its result.
Call: TypeAlias = tuple[Callable[..., object], Callable[[list[Any]], tuple[Any, ...]], int]
#: Numbers that are the same everywhere, with their places.
Uniform: TypeAlias = list[tuple[int, Array]]


@dataclass(slots=True)
class Counting:
    """Numbers that count along one axis, at ``place``."""

    place: int
    axis: int
    dtype: str


@dataclass(slots=True)
class Packing:
    """What is copied from ``source`` to ``buffer`` first: it is the same wherever it is so along ``axes``."""

    source: int
    buffer: int
    axes: tuple[int, ...]


@dataclass(slots=True)
class CompiledBody:
    """What :func:`compile_body` makes, for a :class:`Frame` to run.

    Attributes
    ----------
    lengths
        Of the axes that are gone through.
    places
        How many there are.
    reads, targets
        What is read and written in pieces: places and where they lie.
    uniform_reads, constants
        Numbers that are the same everywhere.
    uniform_calls
        What is computed from them alone: function, places of operands, place and dtype of the result.
    counts
        Of ``iota``.
    packs
        What is copied to a buffer first, because its rows are short.
    calls
        What is done for each piece.
    buffers
        Pairs of a place and a dtype, for each buffer.
    value
        The place of the value that is asked for; -1 for none.
    value_is_free
        Whether that value may be written over.
    beside
        As given, along ``lengths``.
    weight
        Operations per element, for estimates.
    """

    lengths: Shape
    places: int = 0
    reads: list[tuple[int, Access]] = field(default_factory=list)
    targets: list[tuple[int, Access]] = field(default_factory=list)
    uniform_reads: list[tuple[int, Access]] = field(default_factory=list)
    constants: list[tuple[int, Array]] = field(default_factory=list)
    uniform_calls: list[tuple[Callable[..., object], list[int], int, str]] = field(default_factory=list)
    counts: list[Counting] = field(default_factory=list)
    packs: list[Packing] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    buffers: list[list[tuple[int, str]]] = field(default_factory=list)
    value: int = -1
    value_is_free: bool = False
    beside: list[Access] = field(default_factory=list)
    weight: int = 1

    @property
    def buffer_bytes(self) -> int:
        """What the buffers take for each element of a piece."""
        return sum(max(np.dtype(dtype).itemsize for _, dtype in views) for views in self.buffers)

    def scratch_bytes(self, count: int) -> int:
        """Return what the buffers take for pieces of ``count`` elements."""
        return self.buffer_bytes * count + _LINE_BYTES * len(self.buffers)

    def tile_max_count(self, threads: int = 1) -> int:
        """Return how many elements a piece may have for its buffers to stay in the cache."""
        scratch_bytes, most = limits.CPU_SCRATCH_BYTES, limits.CPU_TILE_MAX_COUNT
        if threads >= limits.CPU_MANY_THREADS_COUNT:
            scratch_bytes, most = limits.CPU_MANY_THREADS_SCRATCH_BYTES, limits.CPU_MANY_THREADS_TILE_MAX_COUNT
        fitting = scratch_bytes // max(1, self.buffer_bytes)
        # Whole pages, and lengths that vector registers divide.
        fitting = 1 << max(0, fitting.bit_length() - 1)
        return max(limits.CPU_TILE_MIN_COUNT, min(most, fitting))


class Frame:
    """The arrays of one thread while it works through pieces of a body.

    Parameters
    ----------
    uniform
        From :func:`uniform_values`.
    scratch
        Memory for the buffers: :meth:`CompiledBody.scratch_bytes` of the largest piece.
    """

    def __init__(self, body: CompiledBody, blocks: Blocks, uniform: Uniform, scratch: Array) -> None:
        self._body, self._scratch = body, scratch
        self.places: list[Any] = [None] * body.places
        self._bases = [(place, access.array(blocks, body.lengths)) for place, access in (*body.reads, *body.targets)]
        for place, array in uniform:
            self.places[place] = array
        self._shape: Shape | None = None
        self._counted: dict[int, slice] = {}
        self._packed: dict[int, list[slice]] = {}

    def run(self, piece: Piece) -> Any:
        """Compute ``piece``; return the value that the body was compiled for, if any."""
        places, body = self.places, self._body
        key, shape = piece
        if shape != self._shape:
            self._lay_out(shape)
        for place, base in self._bases:
            places[place] = base[key] if shape != body.lengths else base
        for counting in body.counts:
            self._count(counting, key[counting.axis])
        for packing in body.packs:
            parts = [key[axis] for axis in packing.axes]
            if self._packed.get(packing.buffer) != parts:
                _pack(places[packing.source], places[packing.buffer])
                self._packed[packing.buffer] = parts
        for function, pick, result in body.calls:
            function(*pick(places), out=places[result])
        return places[body.value] if body.value >= 0 else None

    def _lay_out(self, shape: Shape) -> None:
        """Make the buffers arrays of ``shape``."""
        self._shape = shape
        self._packed.clear()
        count = prod(shape)
        start = 0
        for views in self._body.buffers:
            for place, dtype in views:
                self.places[place] = np.ndarray(shape, dtype, self._scratch, start)
            size = count * max(np.dtype(dtype).itemsize for _, dtype in views)
            start += -(-size // _LINE_BYTES) * _LINE_BYTES

    def _count(self, counting: Counting, part: slice) -> None:
        if self._counted.get(counting.place) == part:
            return
        shape = [1] * len(self._body.lengths)
        shape[counting.axis] = part.stop - part.start
        numbers = np.arange(part.start, part.stop).astype(counting.dtype)
        self.places[counting.place] = numbers.reshape(shape)
        self._counted[counting.place] = part


def uniform_values(body: CompiledBody, blocks: Blocks) -> Uniform:
    """Return the numbers that are the same for all pieces, with their places."""
    found = dict(body.constants)
    for place, access in body.uniform_reads:
        found[place] = access.array(blocks, ())
    for function, operands, place, dtype in body.uniform_calls:
        found[place] = np.empty((), dtype)
        function(*(found[operand] for operand in operands), out=found[place])
    return list(found.items())


def compile_body(
    body: Body, results: Sequence[tuple[int, Access]], value: int | None = None, *, beside: Sequence[Access] = ()
) -> CompiledBody:
    """Return the calls that compute ``body``.

    Parameters
    ----------
    results
        Slots, and where they are stored, along the axes of ``body``.
    value
        A slot that is asked for piece by piece.
    beside
        What is gone through by others, along the axes of ``body``.
    """
    return _Compiler(body, results, value, beside).compiled


class _Compiler:
    def __init__(
        self, body: Body, results: Sequence[tuple[int, Access]], value: int | None, beside: Sequence[Access]
    ) -> None:
        self._body, self._results = body, results
        self._read_count = len(body.reads)
        self._place_count = 0
        self._places: dict[int, int] = {}
        self._uniform: set[int] = set()
        self._targets: dict[int, list[int]] = defaultdict(list)
        self._value = value
        self._free: dict[int, list[int]] = defaultdict(list)
        self._buffer_of: dict[int, int] = {}
        self._buffer_sizes: list[int] = []
        self._views: dict[tuple[int, str], int] = {}
        self._collapse(beside)
        self._read()
        self._last_use = self._find_last_uses()
        for number, one in enumerate(body.instructions):
            self._add(self._read_count + number, one)
        self._finish()

    def _collapse(self, beside: Sequence[Access]) -> None:
        shape = self._body.shape
        rank = range(len(shape))
        strides = [view.strides for view in self._body.reads]
        counts = [one for one in self._body.instructions if one.op == "iota"]
        strides += [tuple(int(axis == one.axis) for axis in rank) for one in counts]
        strides += [access.strides for access in (*(access for _, access in self._results), *beside)]
        lengths, found = collapse(shape, strides or [element_strides(shape)])
        self.compiled = CompiledBody(lengths or (1,))
        # One element has an axis too, along which it does not move.
        self._strides = list(found if lengths else [(0,)] * len(found))
        for number, access in enumerate(beside, len(self._strides) - len(beside)):
            self.compiled.beside.append(replace(access, strides=self._strides[number]))

    def _place(self) -> int:
        self._place_count += 1
        return self._place_count - 1

    def _dtype(self, slot: int) -> str:
        if slot < self._read_count:
            return self._body.read_dtypes[slot]
        return self._body.instructions[slot - self._read_count].dtype

    def _read(self) -> None:
        compiled = self.compiled
        for slot, (view, dtype) in enumerate(zip(self._body.reads, self._body.read_dtypes, strict=True)):
            strides = self._strides.pop(0)
            place = self._places[slot] = self._place()
            if any(strides):
                compiled.reads.append((place, Access(view.block, dtype, view.offset, strides)))
                if self._is_packed(strides):
                    self._places[slot] = self._packed(place, dtype, strides)
            else:
                self._uniform.add(slot)
                compiled.uniform_reads.append((place, Access(view.block, dtype, view.offset, ())))
        for number, one in enumerate(self._body.instructions):
            if one.op == "iota":
                self._read_count_along(self._read_count + number, one, self._strides.pop(0))
        for slot, access in self._results:
            place = self._place()
            compiled.targets.append((place, Access(access.block, access.dtype, access.offset, self._strides.pop(0))))
            self._targets[slot].append(place)
        for slot in range(self._read_count):
            self._store(slot, self._targets[slot])

    def _read_count_along(self, slot: int, one: Instruction, strides: tuple[int, ...]) -> None:
        place = self._places[slot] = self._place()
        if not any(strides):
            self._uniform.add(slot)
            self.compiled.constants.append((place, np.zeros((), one.dtype)))
            return
        self.compiled.counts.append(Counting(place, strides.index(1), one.dtype))
        if self._is_packed(strides):
            self._places[slot] = self._packed(place, one.dtype, strides)

    def _is_packed(self, strides: tuple[int, ...]) -> bool:
        """Whether a read is copied to a buffer first: its rows are too short for NumPy's loops over them."""
        lengths = self.compiled.lengths
        return (
            len(lengths) > 1 and lengths[-1] <= limits.CPU_SHORT_ROW_MAX_COUNT and strides != element_strides(lengths)
        )

    def _packed(self, place: int, dtype: str, strides: tuple[int, ...]) -> int:
        # It is of no instruction, and so never given to another value.
        buffer = self._take_buffer(np.dtype(dtype).itemsize)
        packed = self._view(buffer, dtype)
        axes = tuple(axis for axis, stride in enumerate(strides) if stride)
        self.compiled.packs.append(Packing(place, packed, axes))
        return packed

    def _find_last_uses(self) -> dict[int, int]:
        """Return the number of the last instruction that needs each slot's value."""
        last: dict[int, int] = {}
        root: dict[int, int] = {}
        for number, one in enumerate(self._body.instructions):
            slot = self._read_count + number
            root[slot] = slot
            for operand in one.operands:
                last[root.get(operand, operand)] = number
            if one.op == "copy":
                root[slot] = root.get(one.operands[0], one.operands[0])
        end = len(self._body.instructions)
        if self._value is not None:
            last[root.get(self._value, self._value)] = end
        self._root = root
        return last

    # --- Buffers ----------------------------------------------------------------------------------

    def _take_buffer(self, itemsize: int) -> int:
        free = self._free[itemsize]
        if free:
            return free.pop()
        self._buffer_sizes.append(itemsize)
        self.compiled.buffers.append([])
        return len(self._buffer_sizes) - 1

    def _view(self, buffer: int, dtype: str) -> int:
        """Return the place of a buffer as an array of ``dtype``."""
        place = self._views.get((buffer, dtype))
        if place is None:
            place = self._views[buffer, dtype] = self._place()
            self.compiled.buffers[buffer].append((place, dtype))
        return place

    def _release(self, slots: Sequence[int], number: int) -> None:
        """Let the buffers of values that are needed no more be used by others."""
        for slot in dict.fromkeys(self._root.get(slot, slot) for slot in slots):
            if self._last_use.get(slot, -1) <= number and slot in self._buffer_of:
                buffer = self._buffer_of.pop(slot)
                self._free[self._buffer_sizes[buffer]].append(buffer)

    # --- Instructions -----------------------------------------------------------------------------

    def _add(self, slot: int, one: Instruction) -> None:
        number = slot - self._read_count
        targets = self._targets[slot]
        if one.op == "constant":
            self._places[slot] = self._place()
            self._uniform.add(slot)
            self.compiled.constants.append((self._places[slot], np.asarray(one.value, one.dtype)))
        elif one.op == "copy":
            (operand,) = one.operands
            self._places[slot] = self._places[operand]
            if operand in self._uniform:
                self._uniform.add(slot)
        elif one.op != "iota":
            self._compute(slot, one, number, targets[0] if targets else None)
        self._store(slot, targets)
        self._release([*one.operands, slot], number)

    def _store(self, slot: int, targets: Sequence[int]) -> None:
        """Copy a value to where it is wanted and is not yet."""
        for target in targets:
            if target != self._places[slot]:
                self._call(_copy, [self._places[slot]], target)

    def _compute(self, slot: int, one: Instruction, number: int, target: int | None) -> None:
        function = _function(one)
        operands = [self._places[operand] for operand in one.operands]
        self.compiled.weight += 1 if one.op in ("cast", "where") else OPS[one.op].flops
        if all(operand in self._uniform for operand in one.operands):
            place = self._places[slot] = self._place()
            self._uniform.add(slot)
            self.compiled.uniform_calls.append((function, operands, place, one.dtype))
            return
        if target is not None:
            self._places[slot] = target
        else:
            itemsize = np.dtype(one.dtype).itemsize
            if one.op in OPS and OPS[one.op].ufunc is not None and one.dtype == one.operand_dtype:
                # A ufunc may write where it has just read.
                self._release(one.operands, number)
            buffer = self._buffer_of[slot] = self._take_buffer(itemsize)
            self._places[slot] = self._view(buffer, one.dtype)
        self._call(function, operands, self._places[slot])

    def _call(self, function: Callable[..., object], operands: list[int], result: int) -> None:
        # It makes a tuple of several; of a single one with a slice, too.
        pick = itemgetter(*operands) if len(operands) > 1 else itemgetter(slice(operands[0], operands[0] + 1))
        self.compiled.calls.append((function, pick, result))

    def _finish(self) -> None:
        compiled = self.compiled
        if self._value is not None:
            place, dtype = self._places[self._value], self._dtype(self._value)
            # Those that ask may write over buffers; these must stay, or are not of the whole shape.
            shared = [*(one.place for one in compiled.counts), *(one.buffer for one in compiled.packs)]
            if self._value in self._uniform or place in shared:
                spread = self._view(self._take_buffer(np.dtype(dtype).itemsize), dtype)
                self._call(_copy, [place], spread)
                place = spread
            compiled.value = place
            compiled.value_is_free = place in self._views.values()
        compiled.places = self._place_count


def _function(one: Instruction) -> Callable[..., object]:
    if one.op == "cast":
        return _cast
    if one.op == "where":
        return _select_of(np.dtype(one.dtype).itemsize)
    ufunc = OPS[one.op].ufunc
    assert ufunc is not None, one.op
    return ufunc


def _copy(operand: Array, out: Array) -> None:
    np.copyto(out, operand)


def _cast(operand: Array, out: Array) -> None:
    np.copyto(out, operand, casting="unsafe")


def _select_of(itemsize: int) -> Callable[..., None]:
    integer = np.dtype(f"u{itemsize}")

    def select(condition: Array, one: Array, other: Array, out: Array) -> None:
        # In whole numbers, whose bits come through: other + condition * (one - other). Several times as fast as
        # np.where, which goes from element to element.
        chosen, kept, found = one.view(integer), other.view(integer), out.view(integer)
        np.subtract(chosen, kept, out=found)
        np.multiply(found, condition.view(np.uint8), out=found, dtype=integer)
        np.add(found, kept, out=found)

    return select


def _pack(source: Array, buffer: Array) -> None:
    """Copy ``source``, repeated to the shape of ``buffer``, column by column: rows are short."""
    source = np.broadcast_to(source, buffer.shape)
    for column in range(buffer.shape[-1]):
        np.copyto(buffer[..., column], source[..., column])
