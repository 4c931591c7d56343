"""Every collective, over every kind of link, against a reference in double precision; and bits across ranks."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.collectives.cost import ALL_REDUCE_ALGORITHMS
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.transport.arena import has_sealed_files
from sparkle_mesh.transport.ciphers import AES_256_GCM
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.memory import memory_link_pair
from sparkle_mesh.transport.records import RecordOpener, RecordSealer
from sparkle_mesh.transport.shared_memory import SharedMemory
from sparkle_mesh.transport.tcp import TcpLink

LINEAGE = b"R" * 32
FLOATS = ["f2", ml_dtypes.bfloat16, "f4", "f8"]
INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
COMPLEX = ["c8", "c16"]
LINKS = [
    "memory",
    "tcp",
    pytest.param("shared_memory", marks=pytest.mark.skipif(not has_sealed_files(), reason="Linux")),
]
# How far the result may be from the reference, in units of the dtype's own precision, where it is added up in itself.
UNITS = 7
PRECISION = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53, "complex64": 2.0**-23}


async def _tcp_pair(stack: AsyncExitStack, one: int, other: int) -> tuple[Link, Link]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        a = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        b = await listener.accept()
    there, back = (bytes([one, other, way]).ljust(32, b"k") for way in (0, 1))
    here = TcpLink(a, str(other), RecordSealer(AES_256_GCM, there), RecordOpener(AES_256_GCM, back))
    beyond = TcpLink(b, str(one), RecordSealer(AES_256_GCM, back), RecordOpener(AES_256_GCM, there))
    for link in (here, beyond):
        stack.push_async_callback(link.aclose)
    return here, beyond


async def _shared_pair(memories: list[SharedMemory], one: int, other: int) -> tuple[Link, Link]:
    ends = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()]
    made: list[Any] = [None, None]

    async def share(at: int, rank: int, peer: int) -> None:
        made[at] = await memories[rank].share(ends[at], str(peer))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(share, 0, one, other)
        nursery.start_soon(share, 1, other, one)
    return made[0], made[1]


@asynccontextmanager
async def ranks(kind: str, size: int, topology: Topology | None = None) -> AsyncIterator[list[CollectiveGroup]]:
    """Groups of ``size`` ranks over links of ``kind``."""
    async with AsyncExitStack() as stack:
        memories = [SharedMemory(SYSTEM_ENTROPY) for _ in range(size)] if kind == "shared_memory" else []
        for memory in memories:
            stack.callback(memory.close)
        links: list[dict[int, Link]] = [{} for _ in range(size)]
        for one in range(size):
            for other in range(one + 1, size):
                if kind == "tcp":
                    pair = await _tcp_pair(stack, one, other)
                elif kind == "shared_memory":
                    pair = await _shared_pair(memories, one, other)
                    for link in pair:
                        stack.push_async_callback(link.aclose)
                else:
                    pair = memory_link_pair(str(one), str(other))
                links[one][other], links[other][one] = pair
        groups = [
            CollectiveGroup(
                rank=rank,
                size=size,
                links=links[rank],
                lineage=LINEAGE,
                epoch=0,
                memory=memories[rank] if memories else None,
                topology=topology,
            )
            for rank in range(size)
        ]
        async with trio.open_nursery() as nursery:
            for group in groups:
                await nursery.start(group.run)
            yield groups
            nursery.cancel_scope.cancel()


async def each(groups: list[CollectiveGroup], call: Any) -> list[Any]:
    """Await ``call(rank, group)`` of all ranks at once; return what they return."""
    results: list[Any] = [None] * len(groups)

    async def one(rank: int) -> None:
        results[rank] = await call(rank, groups[rank])

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for rank in range(len(groups)):
                nursery.start_soon(one, rank)
    return results


def numbers(dtype: Any, shape: tuple[int, ...], seed: int, *, spice: bool = False) -> np.ndarray[Any, Any]:
    """Numbers of both signs (where there are), some zero; with ``spice`` also NaN of both signs, and infinities."""
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return random.integers(info.min, info.max, shape, kind, endpoint=True)
    values = random.normal(size=shape)
    if kind.kind == "c":
        values = values + 1j * random.normal(size=shape)
    made = values.astype(kind)
    made[random.random(shape) < 0.1] = 0
    if spice:
        for what in (np.nan, -np.nan, np.inf, -np.inf, -0.0):
            made[random.random(shape) < 0.1] = what
    return made


def reference(arrays: list[np.ndarray[Any, Any]], op: str) -> np.ndarray[Any, Any]:
    kind = arrays[0].dtype
    if kind.kind in "iu":
        wide = [array.copy() for array in arrays]
    else:
        wide = [array.astype(complex if kind.kind == "c" else np.float64) for array in arrays]
    ufunc = {"sum": np.add, "mean": np.add, "min": np.minimum, "max": np.maximum, "prod": np.multiply}[op]
    with np.errstate(all="ignore"):
        total = wide[0]
        for other in wide[1:]:
            total = ufunc(total, other)
        return total / len(wide) if op == "mean" else total


def check(result: np.ndarray[Any, Any], arrays: list[np.ndarray[Any, Any]], op: str) -> None:
    """Compare with the reference; the tolerance is that of adding up in the dtype (halves: of rounding once)."""
    expected = reference(arrays, op)
    if result.dtype.kind in "iu":
        np.testing.assert_array_equal(result, expected)
        return
    wide = result.astype(expected.dtype)
    assert np.array_equal(np.isnan(wide), np.isnan(expected))
    finite = np.isfinite(expected)
    assert np.array_equal(wide[~finite & ~np.isnan(expected)], expected[~finite & ~np.isnan(expected)])
    size = sum(np.abs(array.astype(expected.dtype)) for array in arrays) if op in ("sum", "mean") else np.abs(expected)
    precision = PRECISION.get(result.dtype.name, 2.0**-52)
    units = 1.01 if precision > 2.0**-20 else UNITS
    tiny = float(np.finfo(np.float16 if result.dtype == np.float16 else np.float32).tiny)
    with np.errstate(invalid="ignore"):
        scale = np.abs(expected) + (0 if precision > 2.0**-20 else size)
        assert np.all(np.abs(wide - expected)[finite] <= (units * precision * scale + tiny)[finite])


OPS_OF = {kind: ["sum", "min", "max", "prod"] if kind in INTEGERS else ["sum", "mean", "min", "max", "prod"]
          for kind in [*INTEGERS, *FLOATS, *COMPLEX]}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_reduce_by_every_algorithm(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = data.draw(st.sampled_from([*INTEGERS, *FLOATS, *COMPLEX]))
    op = data.draw(st.sampled_from(OPS_OF[dtype]))
    algorithm = data.draw(st.sampled_from(["auto", *ALL_REDUCE_ALGORITHMS]))
    size = data.draw(st.integers(1, 6))
    count = data.draw(st.sampled_from([0, 1, 2, 3, 5, 17, 100, 1000, 3001]))
    segment = data.draw(st.sampled_from([64, 256, 4096, limits.COLLECTIVE_SEGMENT_BYTES]))
    spice = dtype in FLOATS and data.draw(st.booleans())
    staged = data.draw(st.booleans())
    hosts = tuple(data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
    lines = tuple(data.draw(st.lists(st.sampled_from([1e6, 1e8, 1e9]), min_size=size, max_size=size)))

    async def run() -> None:
        async with ranks("memory", size, Topology(size, hosts, lines)) as groups:
            arrays = [numbers(dtype, (count,), rank, spice=spice) for rank in range(size)]
            given = [array.copy() for array in arrays]
            calls: list[Any] = [[array[: count // 2], array[count // 2 :]] for array in given] if staged else given
            await each(groups, lambda r, g: g.all_reduce(calls[r], op, algorithm=algorithm, timeout_s=20))
            assert len({array.tobytes() for array in given}) == 1
            check(given[0], arrays, op)

    with monkeypatch.context() as patch:
        patch.setattr(limits, "COLLECTIVE_SEGMENT_MIN_BYTES", segment)
        patch.setattr(limits, "COLLECTIVE_SEGMENT_BYTES", segment)
        patch.setattr(limits, "COLLECTIVE_PART_BYTES", min(1024, segment))
        trio.run(run)


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("dtype", [np.dtype(dtype).name for dtype in ("i2", *FLOATS, "c8")])
async def test_all_reduce_over_every_kind_of_link(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COLLECTIVE_SEGMENT_MIN_BYTES", 16 * limits.KIB)
    what = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    size = 4
    topology = Topology(size, (0, 0, 1, 2), (1e9, 1e9, 1e9, 1e8))
    async with ranks(kind, size, topology) as groups:
        for algorithm in ["auto", *ALL_REDUCE_ALGORITHMS] + (["shared"] if kind == "shared_memory" else []):
            for op in ("sum", "max", "prod"):
                arrays = [numbers(what, (50_001,), rank) for rank in range(size)]
                given = [array.copy() for array in arrays]
                await each(groups, lambda r, g, d=given, a=algorithm, o=op: g.all_reduce(d[r], o, algorithm=a))
                assert len({array.tobytes() for array in given}) == 1, (algorithm, op)
                check(given[0], arrays, op)


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
async def test_the_other_collectives(kind: str, size: int) -> None:
    async with ranks(kind, size) as groups:
        for dtype in ("f4", "f2", "i8"):
            for shape in [(0,), (1,), (7, 3), (10_001,)]:
                await check_the_others(groups, dtype, shape)


async def check_the_others(groups: list[CollectiveGroup], dtype: str, shape: tuple[int, ...]) -> None:
    size = len(groups)
    arrays = [numbers(dtype, shape, rank) for rank in range(size)]
    stacked = np.stack(arrays)
    root = size - 1

    given = [array.copy() for array in arrays]
    results = await each(groups, lambda r, g: g.reduce(given[r], "sum", root))
    check(results[root], arrays, "sum")
    assert all(np.array_equal(given[rank], arrays[rank]) for rank in range(size) if rank != root)

    for rank, part in enumerate(await each(groups, lambda r, g: g.reduce_scatter(arrays[r], "max"))):
        rows = np.array_split(np.arange(shape[0]), size)[rank]
        assert part.dtype == dtype
        check(part, [array[rows] for array in arrays], "max")

    for gathered in await each(groups, lambda r, g: g.all_gather(arrays[r])):
        np.testing.assert_array_equal(gathered, stacked)

    given = [array.copy() for array in arrays]
    await each(groups, lambda r, g: g.broadcast(given[r], root))
    assert all(array.tobytes() == arrays[root].tobytes() for array in given)

    many = await each(groups, lambda r, g: g.gather({"a": arrays[r], "b": arrays[r][::2]}, root))
    np.testing.assert_array_equal(many[root]["a"], stacked)
    np.testing.assert_array_equal(many[root]["b"], stacked[:, ::2])
    assert all(many[rank] == {"a": None, "b": None} for rank in range(size) if rank != root)

    outs = [stacked if rank == root else np.zeros_like(arrays[rank]) for rank in range(size)]
    for rank, row in enumerate(await each(groups, lambda r, g: g.scatter(outs[r], root))):
        np.testing.assert_array_equal(row, arrays[rank])
        assert rank == root or row is outs[rank]

    grids = [np.stack([arrays[rank] + to for to in range(size)]).astype(dtype) for rank in range(size)]
    for rank, grid in enumerate(await each(groups, lambda r, g: g.all_to_all([grids[r], grids[r]]))):
        for half in grid:
            np.testing.assert_array_equal(half, np.stack([grids[other][rank] for other in range(size)]))


async def test_nan_of_either_sign_and_zeros_end_as_the_same_bits_everywhere() -> None:
    async with ranks("memory", 3) as groups:
        for algorithm in ALL_REDUCE_ALGORITHMS:
            for op in ("sum", "min", "max", "prod", "mean"):
                arrays = [numbers("f4", (500,), rank, spice=True) for rank in range(3)]
                given = [array.copy() for array in arrays]
                await each(groups, lambda r, g, d=given, a=algorithm, o=op: g.all_reduce(d[r], o, algorithm=a))
                assert len({array.tobytes() for array in given}) == 1, (algorithm, op)
                check(given[0], arrays, op)


@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16])
async def test_halves_are_handed_on_as_they_are(dtype: Any) -> None:
    async with ranks("tcp", 3) as groups:
        for count in (0, 1, 50_001):
            arrays = [numbers(np.dtype(dtype), (count,), rank) for rank in range(3)]
            lists = [[array.copy(), array[::2].copy()] for array in arrays]
            await each(groups, lambda r, g, d=lists: g.broadcast(d[r], 1))
            for whole, half in lists:
                assert whole.tobytes() == arrays[1].tobytes()
                assert half.tobytes() == arrays[1][::2].tobytes()
