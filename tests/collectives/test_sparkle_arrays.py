"""Arrays and buffers of a context in collectives: in place, wherever they were, with the bits of NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparkle_mesh.context import Context
from sparkle_mesh.devices.registry import Registry


@pytest.fixture
def context(tmp_path):
    with Context([], data_dir=tmp_path, registry=Registry(entry_points=list)) as opened:
        yield opened


def numbers(rank: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rank).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("shape", [(), (5,), (40, 30), (0, 3)])
async def test_arrays_are_reduced_in_place(on_ranks, context, shape):
    async def call(rank, mesh):
        plain, array = numbers(rank, shape), context.asarray(numbers(rank, shape))
        await mesh.all_reduce(plain, op="mean")
        assert await mesh.all_reduce(array, op="mean") is array
        assert array.to_numpy().tobytes() == plain.tobytes()
        # It goes on as an array.
        assert np.array_equal((array + 1).to_numpy(), plain + 1)
        return plain.tobytes()

    results = await on_ranks(call)
    assert len(set(results)) == 1


async def test_structures_of_arrays_and_buffers(on_ranks, context):
    async def call(rank, mesh):
        buffer = context.allocate(12).copy_from(numbers(rank, (12,)))
        state = {"weights": context.asarray(numbers(rank, (3, 4))), "bias": numbers(rank, (4,)), "buffer": buffer}
        assert await mesh.all_reduce(state) is state
        assert np.array_equal(np.asarray(buffer).reshape(3, 4), state["weights"].to_numpy())
        return state["weights"].to_numpy().tobytes()

    results = await on_ranks(call)
    assert len(set(results)) == 1
