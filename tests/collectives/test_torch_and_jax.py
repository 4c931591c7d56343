"""Tensors of PyTorch and arrays of JAX, where these are installed: the same bits as NumPy's."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparkle_mesh.collectives.foreign import lend, lend_for
from sparkle_mesh.errors import UsageError
from tests.collectives.conftest import imported


@pytest.fixture
def torch() -> Any:
    return imported("torch", "PyTorch (pip install torch)")


@pytest.fixture
def jnp() -> Any:
    return imported("jax.numpy", "JAX (pip install jax)")


def numbers(rank: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    return np.asarray(np.random.default_rng([rank, *shape]).normal(size=shape) * 20).astype(dtype)


SHAPES: list[tuple[int, ...]] = [(), (0, 2), (3, 4), (5000,)]
DTYPES = [np.int8, np.int64, np.float16, ml_dtypes.bfloat16, np.float32, np.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
async def test_tensors_are_reduced_in_place_to_the_same_bits(
    on_ranks: Any, torch: Any, shape: tuple[int, ...], dtype: Any
) -> None:
    async def call(rank: int, mesh: Any) -> None:
        plain = numbers(rank, shape, dtype)
        tensor = torch.from_numpy(plain.copy().view(np.int16)) if dtype is ml_dtypes.bfloat16 else None
        tensor = torch.from_numpy(plain.copy()) if tensor is None else tensor.view(torch.bfloat16)
        address = tensor.data_ptr()
        for name in ("all_reduce", "broadcast", "reduce"):
            await getattr(mesh, name)(plain)
            assert await getattr(mesh, name)(tensor) is tensor
            assert tensor.data_ptr() == address
            raw = tensor.view(torch.int16) if dtype is ml_dtypes.bfloat16 else tensor
            assert raw.numpy().tobytes() == plain.tobytes()
        if shape:
            rows = await mesh.all_gather(tensor)
            assert isinstance(rows, torch.Tensor)
            assert rows.dtype == tensor.dtype
            assert tuple(rows.shape) == (3, *shape)
            raw = rows.view(torch.int16) if dtype is ml_dtypes.bfloat16 else rows
            assert raw.numpy().tobytes() == (await mesh.all_gather(plain)).tobytes()

    assert await on_ranks(call) == [None] * 3


async def test_gradients_and_parameters_of_a_model(on_ranks: Any, torch: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        torch.manual_seed(rank)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        parameters = list(model.parameters())
        # Parameters require gradients: they are taken as the numbers that they hold.
        assert await mesh.broadcast(parameters) is parameters
        model(torch.ones(2, 4)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        kept = {name: gradient.clone() for name, gradient in gradients.items()}
        await mesh.all_reduce(gradients, "mean")
        for name, parameter in model.named_parameters():
            assert parameter.grad is gradients[name]
            torch.testing.assert_close(parameter.grad, kept[name])
        torch.optim.SGD(parameters, 0.1).step()
        state = model.state_dict()
        rows = await mesh.all_gather(state)
        assert all((rows[name] == state[name]).all() for name in state)

    assert await on_ranks(call) == [None] * 3


def test_layouts_of_tensors(torch: Any) -> None:
    grid = torch.arange(24.0).reshape(4, 6)
    for view in (grid.T, grid[::2, ::3], grid[1], grid[:, 2], grid[0:0]):
        lent = lend(view)
        expected = view.numpy().copy()
        assert lent.arrays.shape == tuple(view.shape)
        lent.arrays[...] += 1
        assert lent.settle() is view
        np.testing.assert_array_equal(view.numpy(), expected + 1)


def test_tensors_that_cannot_be_lent(torch: Any) -> None:
    leaf = torch.ones(2, requires_grad=True)
    cases = (
        (leaf * 2, r"within a graph of gradients.*detach\(\)"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
        (torch.ones(2, dtype=torch.complex64).conj().imag, r"resolve_neg\(\)"),
        (torch.ones(2).to_sparse(), "layout"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).to(torch.float8_e4m3fn), "DLPack's type .* with 8 bits"),
    )
    for tensor, complaint in cases:
        with pytest.raises(UsageError, match=f"the data.*{complaint}"):
            lend(tensor)
    lent = lend(leaf)
    lent.arrays[:] = 5
    assert lent.settle() is leaf
    assert leaf.tolist() == [5, 5]


@pytest.mark.parametrize("dtype", [np.int32, np.float16, ml_dtypes.bfloat16, np.float32, np.complex64])
@pytest.mark.parametrize("shape", SHAPES)
async def test_arrays_of_jax_come_back_as_new_ones(on_ranks: Any, jnp: Any, shape: tuple[int, ...], dtype: Any) -> None:
    async def call(rank: int, mesh: Any) -> None:
        plain = numbers(rank, shape, dtype)
        array = jnp.asarray(plain.copy())
        before = np.asarray(array).tobytes()
        for name in ("all_reduce", "broadcast", "reduce"):
            expected, got = await getattr(mesh, name)(plain.copy()), await getattr(mesh, name)(array)
            assert isinstance(got, jnp.ndarray)
            assert got.dtype == array.dtype
            assert got.device == array.device
            assert np.asarray(got).tobytes() == expected.tobytes()
            assert np.asarray(array).tobytes() == before
        rows = await mesh.all_gather([array])
        assert rows[0].shape == (3, *shape)
        assert rows[0].dtype == array.dtype

    assert await on_ranks(call) == [None] * 3


def test_arrays_of_jax_are_read_where_they_lie(jnp: Any) -> None:
    array = jnp.arange(5.0)
    lent = lend_for("send", array)
    assert lent.arrays.ctypes.data == array.unsafe_buffer_pointer()
    assert not lent.arrays.flags.writeable
    assert lent.settle() is array
