"""Arrays of GPUs: how they pass through the host, with GPUs that are made up; on real ones in ``test_gpu_arrays``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives import cupy_arrays
from sparkle_mesh.collectives.executor import BufferPool
from sparkle_mesh.collectives.foreign import lend, lend_for
from sparkle_mesh.errors import CollectiveAbortedError, DeviceError, MismatchError, UsageError
from sparkle_mesh.state_chunks import StateChunks
from tests.collectives.fake_cupy import CompileException, Gpus, OutOfMemoryError
from tests.collectives.test_dlpack import BFLOAT, FLOAT, ByHand
from tests.mesh.test_mesh_collectives import on_both


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    made = Gpus()
    monkeypatch.setitem(sys.modules, "cupy", made.module)
    pool = BufferPool(cupy_arrays._pin, limits.PINNED_BUFFERS_POOLED_MAX_BYTES)
    monkeypatch.setattr(cupy_arrays, "_pool", pool)
    yield made
    for stream in made.streams.values():
        assert not stream.queue, "nobody waited for a stream"


class Tensor(ByHand):
    """A tensor of PyTorch on a GPU."""

    __module__ = "torch"
    dtype, device = "some dtype", "cuda"
    requires_grad = False
    is_leaf = True

    def is_neg(self) -> bool:
        return False

    def detach(self) -> Tensor:
        self.requires_grad = False
        return self

    def new_empty(self, shape: tuple[int, ...]) -> Tensor:
        return Tensor(np.empty(shape, self.memory.dtype), self.code, shape, device=self.words["device"])


LAYOUTS = {
    "plain": lambda grid: grid,
    "transposed": lambda grid: grid.T,
    "strided": lambda grid: grid[::2, 1::3],
    "0-d": lambda grid: grid[1, 1:2].reshape(()),
    "empty": lambda grid: grid[:0],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_they_pass_through_pinned_memory_and_back(gpus: Gpus, layout: str) -> None:
    grid = np.arange(60.0, dtype=np.float32).reshape(6, 10)
    view = LAYOUTS[layout](grid)
    expected = grid.copy()
    LAYOUTS[layout](expected)[...] *= 2
    array = gpus.array(view)
    lent = lend([array, np.ones(1)])
    np.testing.assert_array_equal(lent.arrays[0], view)
    before = view.copy()
    lent.arrays[0][...] *= 2
    np.testing.assert_array_equal(view, before)
    (got, _) = lent.settle()
    assert got is array
    assert lent.settle()[0] is array
    np.testing.assert_array_equal(grid, expected)


def test_the_arrays_of_a_call_share_one_block_which_is_kept(gpus: Gpus) -> None:
    for _ in range(3):
        lent = lend({f"{n:03}": gpus.array(np.full(n, n, np.int16)) for n in range(300)})
        addresses = [array.ctypes.data for array in lent.arrays.values() if array.size]
        assert all(address % limits.PINNED_ALIGNMENT_BYTES == addresses[0] % 256 for address in addresses)
        assert all((array == n).all() for n, array in enumerate(lent.arrays.values()))
        lent.settle()
    assert len(gpus.pinned) == 1
    # What is neither settled nor released is not reused: a call may be writing to it yet.
    for _ in range(2):
        lend(gpus.array(np.ones(100)))
    assert len(gpus.pinned) == 3


def test_a_state_on_a_gpu_is_refused_before_it_is_fetched(gpus: Gpus) -> None:
    tensor = Tensor(np.ones(2), FLOAT, (2,), device=(2, 0))
    for state in (gpus.array(np.ones(100)), tensor):
        with pytest.raises(UsageError, match="the value of 'w' is on a GPU, or cannot be written to"):
            StateChunks({"a": np.zeros(1), "w": state})
    assert not gpus.pinned
    assert not gpus.fetched_bytes


async def test_memory_of_calls_that_fail_is_kept_for_the_next(gpus: Gpus, on_ranks: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        array = gpus.array(np.full(500, 1.0 + rank))
        with pytest.raises(MismatchError):
            await mesh.all_reduce(array, "sum" if rank else "max")
        with pytest.raises(MismatchError):
            await mesh.all_gather(array if rank else [array])
        mesh.all_reduce_async(array, "sum" if rank else "max")  # for which nobody waits
        await mesh.barrier()
        with pytest.raises(UsageError):
            mesh.all_reduce_async(array, tag="")
        with trio.CancelScope() as scope:
            scope.cancel()
            await mesh.all_reduce(array)
        assert scope.cancelled_caught
        await mesh.barrier()
        async for _ in mesh.uneven([1]):
            with pytest.raises(UsageError):
                await mesh.all_reduce(array, "max")
        assert await mesh.all_reduce(array) is array
        assert (array.memory == 6).all()

    assert await on_ranks(call) == [None] * 3
    assert len(gpus.pinned) == 3


@pytest.mark.parametrize("links", [["tcp"], ["shared_memory", "tcp"]])
def test_memory_of_calls_of_threads_that_fail_is_kept_for_the_next(
    gpus: Gpus, tmp_path: Path, links: list[str]
) -> None:
    def call(mesh: Any) -> None:
        array = gpus.array(np.full(500, 1.0 + mesh.rank))
        with pytest.raises(MismatchError):
            mesh.all_reduce(array, "max" if mesh.rank else "sum")
        with pytest.raises(MismatchError):
            mesh.all_reduce(array, "max" if mesh.rank else "sum", tag="tagged")
        with pytest.raises(MismatchError):
            mesh.all_gather([array] if mesh.rank else array)
        pending = mesh.all_reduce_async(array, "max" if mesh.rank else "sum")
        with pytest.raises(MismatchError):
            pending.wait()
        with pytest.raises(UsageError):
            mesh.all_reduce_async(array, tag="")
        for _ in mesh.uneven([1]):
            with pytest.raises(UsageError):
                mesh.all_reduce(array, "max")
        assert mesh.all_reduce(array) is array
        assert (array.memory == 3).all()

    assert on_both(tmp_path, call, links=links) == [None, None]
    assert len(gpus.pinned) == 2


def test_each_device_has_its_own_stream(gpus: Gpus) -> None:
    arrays = [gpus.array(np.full((2, 3), float(device)).T, device) for device in (1, 0, 1)]
    lent = lend(arrays)
    for host in lent.arrays:
        host += 5
    lent.settle()
    assert [array.memory[0, 0] for array in arrays] == [6, 5, 6]
    assert set(gpus.streams) == {0, 1}


@pytest.mark.parametrize(("device", "stream"), [((2, 0), 1), ((2, 3), 3000), ((10, 0), 0)])
def test_other_libraries_export_to_the_current_stream(gpus: Gpus, device: tuple[int, int], stream: int) -> None:
    memory = np.arange(6, dtype=ml_dtypes.bfloat16)
    tensor = Tensor(memory, BFLOAT, (3, 2), strides=(1, 3), device=device)
    lent = lend(tensor)
    assert tensor.asked[-1]["stream"] == stream
    assert lent.arrays.dtype == ml_dtypes.bfloat16
    assert lent.arrays.astype(int).tolist() == [[0, 3], [1, 4], [2, 5]]
    lent.arrays[0, 1] = 50
    assert lent.settle() is tensor
    assert memory.astype(int).tolist() == [0, 1, 2, 50, 4, 5]
    assert set(gpus.streams) == {device[1]}


def test_what_is_only_written_to_is_not_fetched_and_the_other_way_round(gpus: Gpus) -> None:
    array = gpus.array(np.ones(10))
    lent = lend_for("broadcast", array, at_root=False)
    assert gpus.fetched_bytes == 0
    lent.arrays[:] = 3
    lent.settle()
    assert (array.memory == 3).all()
    lent = lend_for("broadcast", array, at_root=True)
    assert gpus.fetched_bytes == 80
    lent.arrays[:] = 4
    assert lent.settle() is array
    assert (array.memory == 3).all()


async def test_the_same_bits_as_numpy_and_untouched_where_it_raises(gpus: Gpus, on_ranks: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        plain = np.random.default_rng(rank).normal(size=(30, 40)).astype(np.float32)
        array, tensor = gpus.array(plain.copy().T), Tensor(plain.copy(), FLOAT, (30, 40), device=(2, 0))
        with pytest.raises(MismatchError):
            await mesh.all_reduce([array, tensor], "sum" if rank else "max")
        assert array.memory.T.tobytes() == tensor.memory.tobytes() == plain.tobytes()
        data = {"array": array, "tensor": tensor}
        assert await mesh.all_reduce(data, "mean") is data
        rows = await mesh.all_gather(data)
        expected = await mesh.all_gather(await mesh.all_reduce(plain, "mean"))
        assert array.memory.T.tobytes() == tensor.memory.tobytes() == plain.tobytes()
        assert isinstance(rows["array"], gpus.module.ndarray)
        assert isinstance(rows["tensor"], Tensor)
        np.testing.assert_array_equal(rows["array"].memory, expected.transpose(0, 2, 1))
        np.testing.assert_array_equal(rows["tensor"].memory, expected)
        pending = mesh.all_reduce_async(array)
        await mesh.barrier()
        assert await pending.wait() is array
        row = await mesh.scatter(gpus.array(np.arange(3.0)) if rank == 0 else gpus.array(np.zeros(())))
        assert float(row.memory) == rank

    assert await on_ranks(call) == [None] * 3


def test_threads_use_their_own_streams(gpus: Gpus, tmp_path: Path) -> None:
    def call(mesh: Any) -> int:
        array = gpus.array(np.full(5, 1.0 + mesh.rank))
        assert mesh.all_reduce(array) is array
        assert (array.memory == 3).all()
        pending = mesh.all_reduce_async({"a": array})
        assert pending.wait()["a"] is array
        assert pending.wait()["a"] is array
        assert (array.memory == 6).all()
        assert (mesh.all_gather(array).memory == 6).all()
        return threading.get_ident()

    assert set(on_both(tmp_path, call)) == gpus.threads


def test_the_root_is_whom_the_caller_meant(gpus: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(mesh: Any) -> list[Any]:
        rank, group, run = mesh.rank, mesh._mesh._group, mesh._call

        def run_later(function: Any) -> Any:
            # Another thread's call ended meanwhile, in a view with other ranks.
            epoch, members = group.shown
            group.shown = (epoch, members[::-1])
            try:
                return run(function)
            finally:
                group.shown = (epoch, members)

        monkeypatch.setattr(mesh, "_call", run_later)
        sent, reduced = gpus.array(np.full(3, rank + 1.0)), gpus.array(np.full(3, rank + 1.0))
        row = gpus.array(np.array([7.0, 8.0]) if rank == 1 else np.zeros(()))
        mesh.broadcast(sent, root=1)
        mesh.reduce(reduced, root=1)
        got = [sent.memory[0], reduced.memory[0], float(mesh.scatter(row, root=1).memory)]
        with pytest.raises(UsageError, match="root 7 is not a rank"):
            mesh.broadcast(sent, root=7)
        return got

    assert on_both(tmp_path, call) == [[2, 1, 7], [2, 3, 8]]


@pytest.mark.parametrize("broken", ["no CuPy", "full", "read-only", "gradient"])
async def test_what_cannot_be_copied_is_refused_in_its_turn(
    gpus: Gpus, on_ranks: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    complaint = {
        "no CuPy": r"the data, a torch\.Tensor, is on a GPU, from which CuPy copies, .*pip install cupy",
        "full": "the data cannot be copied from its GPU: out of memory",
        "read-only": "is read-only; pass a copy",
        "gradient": "graph of gradients",
    }[broken]
    tensor = Tensor(np.ones(2), FLOAT, (2,), device=(2, 0), flags=1 if broken == "read-only" else 0)
    if broken == "no CuPy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    if broken == "gradient":
        tensor.requires_grad, tensor.is_leaf = True, False
    gpus.full = broken == "full"

    async def call(rank: int, mesh: Any) -> None:
        with pytest.raises(UsageError if rank == 1 else CollectiveAbortedError, match=complaint):
            await mesh.all_reduce(tensor if rank == 1 else np.ones(2))
        await mesh.barrier()

    assert await on_ranks(call) == [None] * 3
    assert (tensor.memory == 1).all()


@pytest.mark.parametrize("kind", [CompileException, OutOfMemoryError])
def test_a_result_that_cannot_be_copied_back_is_told_every_time(gpus: Gpus, kind: type[Exception]) -> None:
    arrays = [gpus.array(np.ones(100)) for _ in range(2)]
    lent = lend(arrays)
    gpus.failures = [kind("an illegal memory access")]
    for _ in range(3):
        with pytest.raises(DeviceError, match="item 0 cannot be copied back to its GPU: an illegal memory access"):
            lent.settle()
    # Its memory is there for the next call.
    assert lend(arrays).settle() is arrays
    assert len(gpus.pinned) == 1


def test_copying_back_that_was_interrupted_is_done_again(gpus: Gpus) -> None:
    array = gpus.array(np.ones(100))
    lent = lend(array)
    lent.arrays[:] = 5
    gpus.failures = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        lent.settle()
    assert lent.settle() is array
    assert (array.memory == 5).all()


def test_parameters_on_gpus_are_taken_as_numbers(gpus: Gpus) -> None:
    parameter = Tensor(np.ones(2), FLOAT, (2,), device=(2, 0))
    parameter.requires_grad = True
    lent = lend([parameter])
    lent.arrays[0][:] = 9
    assert lent.settle()[0] is parameter
    assert (parameter.memory == 9).all()
