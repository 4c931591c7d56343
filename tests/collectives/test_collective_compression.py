"""All-reduces whose numbers are sent in fewer bytes: errors within their bounds, the same bits on every rank."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import check_arrays
from sparkle_mesh.collectives.codecs import CODECS, make_codec
from sparkle_mesh.collectives.compression import Compression, check_compression
from sparkle_mesh.collectives.reduction import check_dtype
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.errors import MismatchError, UsageError

COUNTS = [0, 1, 3, 257, 20_000]


def numbers(count: int, rank: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng([count, rank]).normal(size=count).astype(dtype)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COLLECTIVE_SEGMENT_SLOW_MIN_BYTES", 8192)
    monkeypatch.setattr(limits, "COLLECTIVE_SEGMENT_BYTES", 8192)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
async def test_errors_are_within_bounds_and_bits_are_alike(name: str, size: int, dtype: Any, make_world: Any) -> None:
    topology = Topology(size, tuple(range(size)), tuple(1e8 / (1 + rank % 2) for rank in range(size)))
    async with make_world(size).running() as world:
        for group in world.groups:
            group.topology = topology
        for op in ("sum", "mean", "max"):
            for count in COUNTS:
                arrays = [numbers(count, rank, dtype) for rank in range(size)]
                given = [array.copy() for array in arrays]
                results = await world.each(
                    lambda r, g, d=given, o=op: g.all_reduce(d[r], o, compression=name, timeout_s=20)
                )
                assert all(results[rank] is given[rank] for rank in range(size)), results
                assert len({array.tobytes() for array in given}) == 1
                if count and name != "topk":
                    check_bound(name, op, [array.astype(np.float32) for array in arrays], given[0])


def check_bound(name: str, op: str, arrays: list[np.ndarray[Any, Any]], result: np.ndarray[Any, Any]) -> None:
    """Each input may be off by its bound, and the result by its own; whatever the blocks, those of the largest."""
    size = len(arrays)
    wide = [array.astype(np.float64) for array in arrays]
    exact = {"sum": sum(wide), "mean": sum(wide) / size, "max": np.maximum.reduce(wide)}[op]
    if size == 1:
        np.testing.assert_array_equal(result.astype(np.float32), arrays[0])
        return
    codec = make_codec(name)
    largest = [np.full_like(array, np.abs(array).max()) for array in arrays]
    bounds = [codec.error_bound(array) for array in largest]
    bound = sum(bounds) if op == "sum" else sum(bounds) / size if op == "mean" else np.maximum.reduce(bounds)
    highest = np.full(exact.size, np.abs(exact).max() + np.max(bound), np.float32)
    rounding = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}[result.dtype.name]
    allowed = bound + codec.error_bound(highest) + rounding * highest
    assert np.all(np.abs(result.astype(np.float64) - exact) <= allowed * 1.01)


@pytest.mark.parametrize(("name", "options"), [("int4", {}), ("topk", {"fraction": 1 / 8})])
@pytest.mark.parametrize("op", ["sum", "mean"])
async def test_what_is_lost_comes_back(name: str, options: dict[str, Any], op: str, make_world: Any) -> None:
    size, count, steps = 3, 3000, 60
    packings = [Compression(name, error_feedback=True, **options) for _ in range(size)]
    arrays = [numbers(count, rank) for rank in range(size)]
    exact = np.sum(arrays, axis=0) / (size if op == "mean" else 1)
    total, plain = np.zeros(count), np.zeros(count)
    async with make_world(size).running() as world:
        for _ in range(steps):
            given = [array.copy() for array in arrays]
            await world.each(lambda r, g, d=given: g.all_reduce(d[r], op, compression=packings[r], timeout_s=20))
            assert len({array.tobytes() for array in given}) == 1
            total += given[0]
        given = [array.copy() for array in arrays]
        await world.each(lambda r, g, d=given: g.all_reduce(d[r], op, compression=Compression(name, **options)))
        plain += given[0]
    with_feedback = np.abs(total / steps - exact).mean()
    assert with_feedback < np.abs(plain - exact).mean() / 4
    assert packings[0].feedback is not None
    assert packings[0].feedback.nbytes == 4 * count


async def test_a_call_that_fails_loses_nothing_of_what_was_kept(make_world: Any) -> None:
    packings = [Compression("int4", error_feedback=True) for _ in range(2)]
    async with make_world(2).running() as world:
        data = [numbers(500, rank) for rank in range(2)]
        await world.each(lambda r, g: g.all_reduce(data[r], compression=packings[r], timeout_s=20))
        kept = [packing.feedback.begin((0, "float32"), 500).copy() for packing in packings]  # type: ignore[union-attr]
        assert any(array.any() for array in kept)
        results = await world.each(
            lambda r, g: g.all_reduce(data[r], "sum" if r else "mean", compression=packings[r], timeout_s=20)
        )
        assert all(isinstance(result, MismatchError) for result in results)
        for packing, array in zip(packings, kept, strict=True):
            np.testing.assert_array_equal(packing.feedback.begin((0, "float32"), 500), array)  # type: ignore[union-attr]


async def test_ranks_must_ask_for_the_same(make_world: Any) -> None:
    async with make_world(2).running() as world:
        results = await world.each(
            lambda r, g: g.all_reduce(numbers(50, r), compression="int8" if r else "int4", timeout_s=20)
        )
        assert all("int8" in str(result) and "int4" in str(result) for result in results)


@pytest.mark.parametrize(
    ("asked", "data", "op", "algorithm", "text"),
    [
        ("zip", np.ones(3, np.float32), "sum", "auto", "codec 'zip' is not one of"),
        (8, np.ones(3, np.float32), "sum", "auto", "compression is 8; give one of 'auto', 'float16'"),
        ("int8", np.ones(3), "sum", "auto", "the array is of dtype float64; float32, float16 and bfloat16"),
        ("int8", [np.ones(3, np.float32), np.ones(3, int)], "sum", "auto", "array 1 is of dtype int64"),
        ("int8", np.ones(3, np.float32), "sum", "ring", "algorithm 'ring' does not go with compression"),
        (Compression("int8", error_feedback=True), np.ones(3, np.float32), "max", "auto", "op 'max' does not go with"),
    ],
)
def test_what_cannot_be_is_refused(asked: object, data: Any, op: str, algorithm: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_compression(asked, check_arrays(data, check_dtype), op, algorithm, Topology(2))


def test_auto_compresses_for_slow_lines_alone() -> None:
    arrays = check_arrays(np.ones(4 << 20, np.float32), check_dtype)
    slow = Topology(4, (0, 1, 2, 3), (12.5e6,) * 4, ((25e-3,) * 4,) * 4)
    fast = Topology(4)
    chosen = check_compression("auto", arrays, "sum", "auto", slow)
    assert chosen is not None
    assert chosen.codec.name == "int8"
    assert check_compression("auto", arrays, "sum", "auto", fast) is None
    assert check_compression("auto", arrays, "sum", "ring", slow) is None
    assert check_compression("auto", check_arrays(np.ones(10**6), check_dtype), "sum", "auto", slow) is None
    assert check_compression("auto", check_arrays([], check_dtype), "sum", "auto", slow) is None
    assert check_compression(None, arrays, "sum", "auto", slow) is None


def test_compressions_describe_themselves() -> None:
    assert repr(Compression("int8")).startswith("Compression(int8")
    assert "error feedback" in repr(Compression("topk", error_feedback=True, fraction=0.5))
