"""Products of matrices on GPUs: by cuBLAS itself for floats, by CuPy for the rest.

CuPy's ``matmul`` computes into memory of its own and copies the result to where it is wanted, which takes as long again
where matrices are small. Parameters of cuBLAS are settled once for each product. On ROCm, and for integers, CuPy does
it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import cupy
import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.devices.batches import batch_starts
from sparkle_mesh.devices.device import Native, Shape
from sparkle_mesh.devices.products import Product

# cublasOperation_t, cublasGemmAlgo_t.
_OPERATIONS = {False: 0, True: 1}
_DEFAULT = -1
_IS_HIP = cupy.cuda.runtime.is_hip
if not _IS_HIP:
    from cupy_backends.cuda.libs import cublas

    # cudaDataType_t, cublasComputeType_t: float16 is summed in float32, as everywhere.
    _TYPES = {"float16": (2, 68), "float32": (0, 68), "float64": (1, 70)}
    _SCALARS = {"float16": np.float32, "float32": np.float32, "float64": np.float64}

Multiplier = Callable[[Native, Native, Native], None]


def multiplier(product: Product, activated: Callable[[], AbstractContextManager[object]]) -> Multiplier:
    """Return what queues ``out = a @ b`` on the device that ``activated`` makes the thread's."""
    fits = max(*product.shape_a, *product.shape_b, *product.shape) <= limits.CUBLAS_LENGTH_MAX_COUNT
    if not _IS_HIP and product.dtype.name in _TYPES and fits:
        return _by_cublas(product, activated)
    return _by_cupy(product, activated)


def _by_cublas(product: Product, activated: Callable[[], AbstractContextManager[object]]) -> Multiplier:
    kind, compute = _TYPES[product.dtype.name]
    scalar = _SCALARS[product.dtype.name]
    one, zero = np.ones(1, scalar), np.zeros(1, scalar)
    (rows, inner), columns = product.shape_a[-2:], product.shape_b[-1]
    # cuBLAS counts by columns: it is given out.T = b.T @ a.T, which lies in memory as out does.
    op_a, op_b = (_OPERATIONS[exchanged] for exchanged in product.transposed)
    leading_a = rows if product.transposed[0] else inner
    leading_b = inner if product.transposed[1] else columns
    size = product.dtype.itemsize
    runs = list(_runs(product))

    def multiply(a: Native, b: Native, out: Native) -> None:
        at_a, at_b, at_out = a.data.ptr, b.data.ptr, out.data.ptr
        with activated():
            handle = cupy.cuda.device.get_cublas_handle()
            for (start_a, start_b, start_out), (step_a, step_b, step_out), count in runs:
                factor_a, factor_b = at_a + start_a * size, at_b + start_b * size
                result = at_out + start_out * size
                if count == 1:
                    cublas.gemmEx(
                        *(handle, op_b, op_a, columns, rows, inner, one.ctypes.data),
                        *(factor_b, kind, leading_b, factor_a, kind, leading_a, zero.ctypes.data),
                        *(result, kind, columns, compute, _DEFAULT),
                    )
                else:
                    cublas.gemmStridedBatchedEx(
                        *(handle, op_b, op_a, columns, rows, inner, one.ctypes.data),
                        *(factor_b, kind, leading_b, step_b, factor_a, kind, leading_a, step_a, zero.ctypes.data),
                        *(result, kind, columns, step_out, count, compute, _DEFAULT),
                    )

    return multiply


def _runs(product: Product) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Yield where in a, b and out batches begin, how far apart their matrices are, and how many there are."""
    batch = product.shape[:-2]
    count = prod(batch)
    shapes = (product.shape_a, product.shape_b, product.shape)
    if all(prod(shape[:-2]) in (1, count) for shape in shapes):
        steps = tuple(prod(shape[-2:]) if prod(shape[:-2]) == count else 0 for shape in shapes)
        yield (0, 0, 0), steps, count
        return
    for starts in batch_starts(*shapes):
        yield starts, (0, 0, 0), 1


def _by_cupy(product: Product, activated: Callable[[], AbstractContextManager[object]]) -> Multiplier:
    shapes: tuple[Sequence[int], ...] = (product.shape_a, product.shape_b, product.shape)
    exchanged = (*product.transposed, False)
    starts: list[tuple[int, ...]] = [(0, 0, 0)]
    if product.dtype == np.float16:
        # CuPy would convert a whole batch to float32 and back.
        starts = list(batch_starts(*shapes))
        shapes = tuple(shape[-2:] for shape in shapes)
    offsets = [tuple(at * product.dtype.itemsize for at in ats) for ats in starts]

    def multiply(a: Native, b: Native, out: Native) -> None:
        with activated():
            for ats in offsets:
                left, right, result = (
                    _matrices(native.data + at, shape, product.dtype, is_exchanged)
                    for native, at, shape, is_exchanged in zip((a, b, out), ats, shapes, exchanged, strict=True)
                )
                cupy.matmul(left, right, out=result)

    return multiply


def _matrices(pointer: Any, shape: Shape, dtype: np.dtype[Any], exchanged: bool) -> Any:
    """Return an array of ``shape`` at ``pointer``, where the last two axes may be exchanged."""
    if not exchanged:
        return cupy.ndarray(tuple(shape), dtype=dtype, memptr=pointer)
    *batch, rows, columns = shape
    return cupy.ndarray((*batch, columns, rows), dtype=dtype, memptr=pointer).swapaxes(-1, -2)
