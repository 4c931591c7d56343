"""Reductions on processors: in one pass over what is read, and with the same bits however many threads there are.

The body of a reduction is computed piece by piece; each piece is folded while it is in the cache, and what is left of
the pieces is combined in a tree. The cut into pieces and the shape of the tree depend on the shapes and dtypes alone.
Sums are pairwise throughout: by NumPy along rows; across rows by adding one half of them to the other, again and again.
So their error grows with the logarithm of how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.kernels.cpu_body import Frame, compile_body, uniform_values
from sparkle_mesh.kernels.cpu_steps import Workplace
from sparkle_mesh.kernels.cpu_threads import Portions
from sparkle_mesh.kernels.cpu_tiles import Access, Array, Blocks, Key, Piece, Tiles, place_in, reduction_tile_of
from sparkle_mesh.kernels.ops import OPS, Shape, element_strides
from sparkle_mesh.kernels.program import Body, Instruction, ReduceStep

_IDENTITIES = {"sum": 0, "prod": 1}


class PreparedReduction:
    """A :class:`.program.ReduceStep`."""

    def __init__(self, step: ReduceStep, threads: int) -> None:
        self._step = step
        kept = tuple(length for axis, length in enumerate(step.body.shape) if axis not in step.axes)
        self._is_empty = not prod(kept)
        self._has_nothing = not prod(step.body.shape)
        if self._has_nothing:
            return
        ufunc = OPS[step.op].ufunc
        assert ufunc is not None, step.op
        body, slot = step.body, step.slot
        dtype = step.dtype
        if dtype == "float16":
            # Numbers of ten bits are added up in ones of 23.
            dtype = "float32"
            cast = Instruction("cast", (slot,), dtype, "float16")
            slot = len(body.reads) + len(body.instructions)
            body = replace(body, instructions=(*body.instructions, cast))
        strides = iter(element_strides(kept))
        result_strides = tuple(0 if axis in step.axes else next(strides) for axis in range(len(body.shape)))
        body, result_strides = _in_order_of_memory(body, result_strides)
        result = Access(step.result, step.dtype, 0, result_strides)
        # The result is where it is gone through with the rest; nothing is written to it piece by piece.
        self._body = compile_body(body, [], slot, beside=[result])
        self._result = self._body.beside[0]
        lengths = self._body.lengths
        is_kept = [bool(stride) for stride in self._result.strides]
        tile = reduction_tile_of(lengths, is_kept, self._body.tile_max_count())
        in_turn = _axes_of_long_rows(tile, is_kept)
        halved = [
            axis
            for axis, keep in enumerate(is_kept[:-1])
            if not keep and axis not in in_turn and tile[axis] > 1 and is_kept[-1]
        ]
        if not self._body.buffers and not halved:
            most = min(limits.CPU_DIRECT_TILE_MAX_COUNT, prod(lengths) // limits.CPU_DIRECT_TILES_COUNT)
            tile = reduction_tile_of(lengths, is_kept, max(prod(tile), most))
        tile = self._longer(tile, is_kept, threads)
        self._fold = _Fold(ufunc, dtype, tuple(not keep for keep in is_kept), in_turn)
        self._spare_bytes = prod(tile) * np.dtype(dtype).itemsize if halved else 0
        self._tiles = Tiles(lengths, tile)
        grid = self._tiles.grid
        self._kept_grid = tuple(n if keep else 1 for n, keep in zip(grid, is_kept, strict=True))
        self._reduced_grid = tuple(1 if keep else n for n, keep in zip(grid, is_kept, strict=True))
        # Enough parts for all threads, of results that are small.
        self._folded = prod(self._reduced_grid)
        self._groups = max(1, min(self._folded, limits.CPU_REDUCTION_PARTS_COUNT // prod(self._kept_grid)))
        self._count = prod(self._kept_grid) * self._groups
        is_small = self._tiles.count <= limits.CPU_PIECES_KEPT_MAX_COUNT
        self._parts = [self._make_part(number) for number in range(self._count if is_small else 0)]
        self._alone = prod(lengths) * self._body.weight < limits.CPU_SHARED_MIN_COUNT

    def _longer(self, tile: Shape, is_kept: Sequence[bool], threads: int) -> Shape:
        """Return the tile for so many threads: a longer one, where the order in which is added up stays."""
        lengths = self._body.lengths
        longer = reduction_tile_of(lengths, is_kept, self._body.tile_max_count(threads))
        pairs = list(zip(lengths, tile, longer, is_kept, strict=True))
        is_whole = all(keep or length == size == other for length, size, other, keep in pairs)
        is_longer = all(other >= size for _, size, other, _ in pairs)
        same_order = _axes_of_long_rows(tile, is_kept) == _axes_of_long_rows(longer, is_kept)
        enough = prod(-(-length // size) for length, size in zip(lengths, longer, strict=True)) >= 2 * threads
        return longer if is_whole and is_longer and same_order and enough else tile

    def run(self, blocks: Blocks, place: Workplace) -> None:
        """See :class:`.cpu_steps.PreparedStep`."""
        step = self._step
        if self._is_empty:
            return
        if self._has_nothing:
            block = blocks[step.result]
            assert block is not None
            block.fill(_IDENTITIES[step.op])
            return
        body, tiles, fold, groups = self._body, self._tiles, self._fold, self._groups
        kept = tuple(1 if gone else length for length, gone in zip(tiles.lengths, fold.reduced, strict=True))
        result = self._result.array(blocks, kept)
        direct = groups == 1 and step.dtype == fold.dtype
        parts = result[np.newaxis] if direct else np.empty((groups, *kept), fold.dtype)
        uniform = uniform_values(body, blocks)
        scratch_bytes = body.scratch_bytes(prod(tiles.tile))

        def work(portions: Portions) -> None:
            spare, scratch = place.pool.take(self._spare_bytes), place.pool.take(scratch_bytes)
            try:
                frame = Frame(body, blocks, uniform, scratch)
                for number in portions:
                    part = self._part(number)
                    tree = Tree(fold)
                    for piece in part.pieces:
                        portions.check()
                        tree.add(fold.piece(frame.run(piece), spare, is_free=body.value_is_free))
                    parts[part.group][part.key] = tree.total()
            finally:
                place.pool.give_back(spare)
                place.pool.give_back(scratch)

        place.workers.share(self._count, work, alone=self._alone, should_stop=place.should_stop)
        if not direct:
            np.copyto(result, fold.halve(parts, 0, parts)[0], casting="unsafe")

    def _part(self, number: int) -> _Part:
        return self._parts[number] if self._parts else self._make_part(number)

    def _make_part(self, number: int) -> _Part:
        kept_number, group = divmod(number, self._groups)
        kept_place = place_in(self._kept_grid, kept_number)
        pieces = []
        for one in range(group * self._folded // self._groups, (group + 1) * self._folded // self._groups):
            place = place_in(self._reduced_grid, one)
            pieces.append(self._tiles.at([a + b for a, b in zip(kept_place, place, strict=True)]))
        pairs = zip(self._tiles.at(kept_place).key, self._fold.reduced, strict=True)
        return _Part(group, tuple(slice(0, 1) if gone else part for part, gone in pairs), pieces)


class _Part(NamedTuple):
    """Pieces that are combined by one thread, and where they go: which partial result, and where in it."""

    group: int
    key: Key
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class _Fold:
    """How pieces are folded: to one element along axes that are ``reduced``; row by row along those ``in_turn``."""

    ufunc: np.ufunc
    dtype: str
    reduced: tuple[bool, ...]
    in_turn: frozenset[int]

    def piece(self, value: Array, spare: Array, *, is_free: bool) -> Array:
        """Return ``value`` folded, in memory of its own.

        Parameters
        ----------
        spare
            Memory for a piece, if axes before a last one that is kept are reduced, and not in turn.
        is_free
            Whether ``value`` may be written over.
        """
        # One call for each element of a row is less than one for each row.
        last = len(self.reduced) - 1
        is_own = False
        length = value.shape[-1]
        if self.reduced[-1] and length > 1:
            if length <= limits.CPU_SHORT_ROW_MAX_COUNT and value.size > length:
                row = self.combine(value[..., :1], value[..., 1:2], fresh=True)
                for column in range(2, length):
                    self.ufunc(row, value[..., column : column + 1], out=row)
                value = row
            else:
                value = self.ufunc.reduce(value, axis=-1, dtype=self.dtype, keepdims=True)
            is_free = is_own = True
        for axis in range(last - 1, -1, -1):
            if self.reduced[axis] and value.shape[axis] > 1:
                if axis in self.in_turn:
                    value, is_own = self._add_up_in_turn(value, axis), True
                else:
                    value = self.halve(value, axis, value if is_free else self._half_of(value, axis, spare))
                is_free = True
        return value if is_own else value.copy()

    def _add_up_in_turn(self, value: Array, axis: int) -> Array:
        """Return ``value`` with one element along ``axis``: few rows in turn, and what these come to as a tree."""
        tree = Tree(self)
        for start in range(0, value.shape[axis], limits.CPU_ROWS_IN_TURN_COUNT):
            rows = (slice(None),) * axis + (slice(start, start + limits.CPU_ROWS_IN_TURN_COUNT),)
            tree.add(self.ufunc.reduce(value[rows], axis=axis, dtype=self.dtype, keepdims=True))
        return tree.total()

    def _half_of(self, value: Array, axis: int, spare: Array) -> Array:
        shape = list(value.shape)
        shape[axis] = -(-shape[axis] // 2)
        return np.ndarray(shape, self.dtype, spare)

    def halve(self, value: Array, axis: int, target: Array) -> Array:
        """Return ``value`` with one element along ``axis``: in ``target``, which is it, or has half its places."""
        in_place = target is value
        value, target = np.moveaxis(value, axis, 0), np.moveaxis(target, axis, 0)
        count = len(value)
        while count > 1:
            half = count // 2
            rest = count - half
            self.ufunc(value[:half], value[rest:count], out=target[:half])
            if rest > half and not in_place:
                target[half] = value[half]
            value, count, in_place = target, rest, True
        return np.moveaxis(target[:1], 0, axis)

    def combine(self, one: Array, other: Array, *, fresh: bool = False) -> Array:
        """Return both combined: in ``one``, unless it must be ``fresh``."""
        return np.asarray(self.ufunc(one, other, out=None if fresh else one))


def _axes_of_long_rows(tile: Shape, is_kept: Sequence[bool]) -> frozenset[int]:
    """Return the reduced axes whose rows are long, when the last axis has been reduced if it is to be."""
    if not is_kept[-1]:
        tile = (*tile[:-1], 1)
    axes = [axis for axis, keep in enumerate(is_kept[:-1]) if not keep]
    return frozenset(axis for axis in axes if prod(tile[axis + 1 :]) >= limits.CPU_LONG_ROW_MIN_COUNT)


class Tree:
    """Combines arrays pairwise as they come: what each level holds waits for another of its size."""

    def __init__(self, fold: _Fold) -> None:
        self._fold = fold
        self._levels: list[tuple[int, Array]] = []

    def add(self, total: Array) -> None:
        """Take ``total``, which is the tree's from now on."""
        level = 0
        while self._levels and self._levels[-1][0] == level:
            total = self._fold.combine(self._levels.pop()[1], total)
            level += 1
        self._levels.append((level, total))

    def total(self) -> Array:
        """Return what all come to, one at least."""
        _, total = self._levels.pop()
        while self._levels:
            total = self._fold.combine(self._levels.pop()[1], total)
        return total


def _in_order_of_memory(body: Body, result_strides: tuple[int, ...]) -> tuple[Body, tuple[int, ...]]:
    """Return the same with axes in the order in which most of what is read lies in memory."""
    rank = len(body.shape)
    if not body.reads or any(one.op == "iota" for one in body.instructions):
        return body, result_strides
    main = max(body.reads, key=lambda view: sum(map(bool, view.strides)))
    order = sorted(range(rank), key=lambda axis: (main.strides[axis] != 0, -abs(main.strides[axis])))

    def moved(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[axis] for axis in order)

    reads = tuple(replace(view, shape=moved(view.shape), strides=moved(view.strides)) for view in body.reads)
    shape: Shape = moved(body.shape)
    return replace(body, shape=shape, reads=reads), moved(result_strides)
