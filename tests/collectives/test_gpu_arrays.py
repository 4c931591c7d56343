"""Arrays of real GPUs, of CuPy, PyTorch and JAX: skipped where there is no GPU, or not the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparkle_mesh.collectives.foreign import lend
from tests.collectives.conftest import imported
from tests.mesh.test_mesh_collectives import on_both

GPU = "an NVIDIA or AMD GPU that CuPy sees"


@pytest.fixture
def cupy() -> Any:
    module = imported("cupy", f"{GPU}, and CuPy (pip install cupy-cuda13x, cupy-cuda12x or cupy-rocm-7-0)")
    if not module.cuda.is_available():
        pytest.skip(f"needs {GPU}")
    return module


@pytest.fixture
def torch(cupy: Any) -> Any:
    module = imported("torch", "a PyTorch that sees the GPU")
    if not module.cuda.is_available():
        pytest.skip("needs a PyTorch that sees the GPU")
    return module


@pytest.fixture
def jnp(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The others need the memory, too.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = imported("jax", "a JAX that sees the GPU")
    if jax.default_backend() != "gpu":
        pytest.skip("needs a JAX that sees the GPU")
    return jax.numpy


def numbers(rank: int, dtype: Any, shape: tuple[int, ...] = (200, 300)) -> np.ndarray[Any, Any]:
    return np.asarray(np.random.default_rng(rank).normal(size=shape) * 20).astype(dtype)


@pytest.mark.parametrize("dtype", ["i1", "i8", "f2", "f4", "f8", "c8"])
async def test_arrays_of_cupy(on_ranks: Any, cupy: Any, dtype: str) -> None:
    async def call(rank: int, mesh: Any) -> None:
        plain = numbers(rank, dtype)
        total = await mesh.all_reduce(plain.copy())
        for view in (slice(None), slice(None, None, 2), slice(0, 0)):
            array = cupy.asarray(plain)
            assert await mesh.all_reduce([array[view].T, array[1:1]]) is not None
            expected = plain.copy()
            expected[view] = total[view]
            assert cupy.asnumpy(array).tobytes() == expected.tobytes()
        rows = await mesh.all_gather(cupy.asarray(plain))
        assert isinstance(rows, cupy.ndarray)
        assert cupy.asnumpy(rows).tobytes() == (await mesh.all_gather(plain)).tobytes()

    assert await on_ranks(call) == [None] * 3


@pytest.mark.parametrize("dtype", ["i8", "f2", "f4", ml_dtypes.bfloat16])
async def test_tensors_of_torch(on_ranks: Any, torch: Any, dtype: Any) -> None:
    is_bfloat16 = dtype is ml_dtypes.bfloat16

    def tensor_of(array: Any) -> Any:
        raw = torch.from_numpy(array.view(np.int16) if is_bfloat16 else array).cuda()
        return raw.view(torch.bfloat16) if is_bfloat16 else raw

    def bits(tensor: Any) -> bytes:
        return (tensor.view(torch.int16) if is_bfloat16 else tensor).cpu().numpy().tobytes()

    async def call(rank: int, mesh: Any) -> None:
        plain = numbers(rank, dtype)
        tensor = tensor_of(plain.copy())
        for name in ("all_reduce", "broadcast", "reduce"):
            await getattr(mesh, name)(plain)
            assert await getattr(mesh, name)(tensor) is tensor
            assert bits(tensor) == plain.tobytes()
        columns = tensor_of(plain.copy())
        await mesh.all_reduce({"columns": columns[:, ::3]})
        await mesh.all_reduce(plain[:, ::3])
        assert bits(columns) == plain.tobytes()
        rows = await mesh.all_gather(tensor)
        assert rows.is_cuda
        assert rows.dtype == tensor.dtype
        parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
        await mesh.all_reduce(parameter)
        assert parameter.tolist() == [3, 3, 3]

    assert await on_ranks(call) == [None] * 3


async def test_arrays_of_jax(on_ranks: Any, jnp: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        for dtype in ("f4", ml_dtypes.bfloat16):
            plain = numbers(rank, dtype)
            array = jnp.asarray(plain)
            got = await mesh.all_reduce({"a": array})
            assert got["a"].device == array.device
            assert np.asarray(array).tobytes() == plain.tobytes()
            assert np.asarray(got["a"]).tobytes() == (await mesh.all_reduce(plain)).tobytes()

    assert await on_ranks(call) == [None] * 3


def test_streams_of_the_calling_thread_are_waited_for(cupy: Any, torch: Any, tmp_path: Path) -> None:
    size = 4096

    def call(mesh: Any) -> None:
        for _ in range(3):
            with cupy.cuda.Stream(non_blocking=True) as stream:
                late = cupy.eye(size, dtype=np.float32)
                for _ in range(30):  # some tens of milliseconds
                    late = late @ late
                mesh.all_reduce(late)
                late *= 10
                stream.synchronize()
            assert float(late.sum()) == 20 * size
            with torch.cuda.stream(torch.cuda.Stream()):
                tensor = torch.eye(size, device="cuda")
                for _ in range(30):
                    tensor = tensor @ tensor
                pending = mesh.all_reduce_async({"tensor": tensor})
                pending.wait()
                tensor *= 10
                torch.cuda.current_stream().synchronize()
            assert float(tensor.sum()) == 20 * size

    assert on_both(tmp_path, call) == [None, None]


def test_memory_is_pinned_and_reused(cupy: Any) -> None:
    addresses = set()
    for _ in range(4):
        lent = None
        arrays = [cupy.full((number,), number, np.float32) for number in range(1, 301)]
        lent = lend(arrays)
        addresses.add(lent.arrays[0].ctypes.data)
        # cudaMemoryTypeHost: pinned.
        assert cupy.cuda.runtime.pointerGetAttributes(lent.arrays[0].ctypes.data).type == 1
        for host in lent.arrays:
            host += 1
        assert lent.settle() is arrays
        assert all(int(array[-1]) == number + 1 for number, array in enumerate(arrays, start=1))
    assert len(addresses) == 1
