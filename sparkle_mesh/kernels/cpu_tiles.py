"""Where the elements of a step lie, and how they are cut into pieces that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.kernels.ops import Shape

Array: TypeAlias = npt.NDArray[Any]
#: A block for each number in ``Program.blocks``; None for those that do not exist (yet, or any more).
Blocks: TypeAlias = Sequence[Array | None]
Key: TypeAlias = tuple[slice, ...]
# Of grids with so few pieces, all are made beforehand.
_PIECES_KEPT = limits.CPU_PIECES_KEPT_MAX_COUNT


@dataclass(frozen=True, slots=True)
class Access:
    """How a block is gone through along the axes of a step; ``offset`` and ``strides`` count elements."""

    block: int
    dtype: str
    offset: int
    strides: tuple[int, ...]

    def array(self, blocks: Blocks, shape: Shape) -> Array:
        """Return the block's elements as an array of ``shape``; NumPy checks that they are within the block."""
        block = blocks[self.block]
        assert block is not None, f"block {self.block} does not exist at this step"
        if self.strides == (1,) and shape == block.shape:
            return block
        size = block.itemsize
        strides = tuple(stride * size for stride in self.strides)
        return np.ndarray(shape, block.dtype, block, self.offset * size, strides)


class Piece(NamedTuple):
    """A part of an array: its index, and its shape."""

    key: Key
    shape: Shape


class Tiles:
    """A grid of pieces: of ``tile`` elements along each axis of ``lengths``, fewer at the ends.

    Attributes
    ----------
    grid
        How many pieces there are along each axis.
    count
        How many there are.
    """

    def __init__(self, lengths: Shape, tile: Shape) -> None:
        self.lengths, self.tile = lengths, tile
        self.grid = tuple(-(-length // size) for length, size in zip(lengths, tile, strict=True))
        self.count = prod(self.grid)
        self._kept = [self._piece(number) for number in range(self.count if self.count <= _PIECES_KEPT else 0)]

    def piece(self, number: int) -> Piece:
        """Return piece ``number``, counted in C order."""
        return self._kept[number] if self._kept else self._piece(number)

    def _piece(self, number: int) -> Piece:
        return self.at(place_in(self.grid, number))

    def at(self, place: Sequence[int]) -> Piece:
        """Return the piece at ``place`` in the grid."""
        key = tuple(
            slice(number * size, min((number + 1) * size, length))
            for number, size, length in zip(place, self.tile, self.lengths, strict=True)
        )
        return Piece(key, tuple(part.stop - part.start for part in key))


def place_in(grid: Shape, number: int) -> list[int]:
    """Return the place of piece ``number`` of a grid, counted in C order."""
    place = []
    for length in reversed(grid):
        number, here = divmod(number, length)
        place.append(here)
    return place[::-1]


def tile_of(lengths: Shape, strides: Sequence[tuple[int, ...]], count: int) -> Shape:
    """Return the shape of pieces of ``count`` elements at most: whole rows, where memory is read along them.

    Parameters
    ----------
    strides
        Of all that is read and written. What is read across the rows is read in pieces that are as high as wide, so
        that each line of memory which is fetched is used whole before it is dropped.
    """
    tile = [1] * len(lengths)
    order = list(range(len(lengths) - 1, -1, -1))
    crossing = crossing_axis(lengths, strides)
    if crossing is not None:
        tile[-1] = min(lengths[-1], limits.CPU_TILE_SIDE_COUNT)
        order.remove(crossing)
        order = [crossing, *order[1:]]
    left = count // tile[-1] if crossing is not None else count
    for axis in order:
        tile[axis] = max(1, min(lengths[axis], left))
        left //= tile[axis]
    return tuple(tile)


def crossing_axis(lengths: Shape, strides: Sequence[tuple[int, ...]]) -> int | None:
    """Return the axis along which memory is read that is not read along the last one; None if there is none."""
    for steps in strides:
        sizes = [abs(stride) for stride in steps]
        if not sizes or sizes[-1] <= 1:
            continue
        least = min((size, axis) for axis, size in enumerate(sizes) if size)
        if least[1] != len(lengths) - 1:
            return least[1]
    return None


def reduction_tile_of(lengths: Shape, is_kept: Sequence[bool], count: int) -> Shape:
    """Return the shape of pieces of a reduction: few elements that are kept, if others come before them."""
    tile = [1] * len(lengths)
    left, kept_left = count, limits.CPU_KEPT_MAX_COUNT
    for axis in range(len(lengths) - 1, -1, -1):
        room = left
        if is_kept[axis] and not all(is_kept[:axis]):
            room = min(left, kept_left)
        tile[axis] = max(1, min(lengths[axis], room))
        left //= tile[axis]
        if is_kept[axis]:
            kept_left //= tile[axis]
    return tuple(tile)
