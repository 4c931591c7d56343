"""Pieces cover every element once, and have the shapes that memory likes."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.kernels.cpu_memory import BlockPool
from sparkle_mesh.kernels.cpu_tiles import Access, Tiles, place_in, reduction_tile_of, tile_of
from sparkle_mesh.kernels.ops import element_strides

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@given(LENGTHS, st.integers(1, 50), st.data())
def test_pieces_cover_every_element_once(lengths: tuple[int, ...], count: int, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    for tile in (tile_of(lengths, [element_strides(lengths)], count), reduction_tile_of(lengths, kept, count)):
        assert prod(tile) <= count
        tiles = Tiles(lengths, tile)
        seen = np.zeros(lengths, int)
        for number in range(tiles.count):
            piece = tiles.piece(number)
            assert seen[piece.key].shape == piece.shape
            assert piece == tiles.at(place_in(tiles.grid, number))
            seen[piece.key] += 1
        assert (seen == 1).all()


def test_grids_of_many_pieces_are_not_kept() -> None:
    tiles = Tiles((1 << 40,), (1,))
    assert tiles.piece((1 << 40) - 1).key == (slice((1 << 40) - 1, 1 << 40),)


def test_rows_are_whole_where_memory_is_read_along_them() -> None:
    dense = element_strides((1000, 1000))
    assert tile_of((1000, 1000), [dense, (0, 1)], 8192) == (8, 1000)
    assert tile_of((1000, 1000), [dense, (1000, 0)], 500) == (1, 500)


def test_pieces_are_high_where_memory_is_read_across_rows() -> None:
    side = limits.CPU_TILE_SIDE_COUNT
    assert tile_of((1000, 1000), [(1000, 1), (1, 1000)], side * 64) == (64, side)
    # Along both axes at large steps: no line of memory holds two elements.
    assert tile_of((10, 10), [(20, 2)], 50) == (5, 10)


def test_sums_of_columns_are_of_few_columns_at_once() -> None:
    kept = limits.CPU_KEPT_MAX_COUNT
    assert reduction_tile_of((1000, 10**6), [False, True], 1 << 17) == ((1 << 17) // kept, kept)
    assert reduction_tile_of((10**6, 8), [True, False], 1 << 13) == (1 << 10, 8)


def test_views_beyond_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="stride"):
        Access(0, "float32", 0, (2,)).array([np.zeros(4, "float32")], (3,))
    block = np.arange(4, dtype="float32")
    assert Access(0, "float32", 3, (-1,)).array([block], (4,)).tolist() == [3, 2, 1, 0]


def test_blocks_begin_with_a_line_of_the_cache() -> None:
    pool = BlockPool()
    for nbytes in (0, 1, 63, 64, 1000, 10**6):
        block = pool.take(nbytes)
        assert block.nbytes >= nbytes
        assert block.ctypes.data % 64 == 0
        pool.give_back(block)
        assert pool.take(nbytes) is block
