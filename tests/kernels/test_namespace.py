"""The Array API's names give what NumPy's functions of that meaning give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparkle_mesh.errors import TraceError
from sparkle_mesh.kernels import namespace
from sparkle_mesh.kernels.tracing import kernel

X = np.linspace(-0.9, 0.9, 12).reshape(3, 4)
Y = np.linspace(0.1, 2.1, 12).reshape(3, 4)

# In NumPy 2 the same names; what differs is told beside.
SAME: dict[str, Any] = {
    "abs": lambda xp, x, y: xp.abs(x),
    "inverse": lambda xp, x, y: [xp.acos(x), xp.asin(x), xp.atan(x), xp.atanh(x), xp.asinh(y), xp.acosh(y + 1)],
    "atan2": lambda xp, x, y: xp.atan2(x, y),
    "pow": lambda xp, x, y: xp.pow(y, x),
    "unary": lambda xp, x, y: [xp.exp(x), xp.log1p(y), xp.floor(x), xp.round(y), xp.sign(x), xp.signbit(x), xp.conj(x)],
    "bits": lambda xp, x, y: (
        xp.bitwise_left_shift(xp.astype(y, xp.int32), 2) ^ xp.bitwise_invert(xp.astype(x, xp.int32))
    ),
    "logic": lambda xp, x, y: xp.logical_and(x > 0, xp.logical_not(y > 1)),
    "where": lambda xp, x, y: xp.where(x > 0, x, 0),
    "clip": lambda xp, x, y: [xp.clip(x, -0.5, 0.5), xp.clip(x, max=0.1), xp.clip(x, min=y)],
    "logaddexp": lambda xp, x, y: xp.logaddexp(x, y),
    "sums": lambda xp, x, y: [xp.sum(x), xp.prod(y, axis=0), xp.mean(x, axis=(0, 1)), xp.max(x, axis=1, keepdims=True)],
    "spread": lambda xp, x, y: [xp.std(x, correction=1), xp.var(x, axis=0, correction=0)],
    "truth": lambda xp, x, y: [xp.any(x > 0.8, axis=1), xp.all(x > -2), xp.all(x[:0]), xp.any(x[:, :0], axis=1)],
    "matmul": lambda xp, x, y: [xp.matmul(x, xp.matrix_transpose(y)), xp.vecdot(x, y), x.mT, x.T],
    "moves": lambda xp, x, y: [xp.permute_dims(x, (1, 0)), xp.expand_dims(x, axis=1), xp.moveaxis(x, 0, 1), xp.flip(x)],
    "shapes": lambda xp, x, y: [xp.reshape(x, (2, -1)), xp.squeeze(x[:, :1], axis=1), xp.broadcast_to(x[0], (2, 4))],
    "joins": lambda xp, x, y: [xp.concat([x, y], axis=1), xp.concat([x, y], axis=None), xp.stack([x, y], axis=-1)],
    "parts": lambda xp, x, y: [*xp.unstack(x), *xp.unstack(x, axis=1), *xp.broadcast_arrays(x, y[0])],
    "rolls": lambda xp, x, y: [xp.roll(x, 5), xp.roll(x, (1, -1), axis=(0, 1)), xp.repeat(x, 2), xp.tile(x, (2, 1, 2))],
    "diff": lambda xp, x, y: [xp.diff(x), xp.diff(x, n=2, axis=0), xp.diff(x > 0)],
    "triangles": lambda xp, x, y: [xp.tril(x, k=-1), xp.triu(x)],
    "zeros": lambda xp, x, y: [xp.zeros(3), xp.zeros((2, 2), dtype=xp.int8), xp.ones((0, 2)), xp.zeros_like(x)],
    "full": lambda xp, x, y: [
        xp.full((2,), 3),
        xp.full((2,), 0.5, dtype=xp.float32),
        xp.full_like(x, 2),
        xp.ones_like(x),
    ],
    "arange": lambda xp, x, y: [xp.arange(4), xp.arange(1, 7, 2), xp.arange(5, 0, -2), xp.arange(2, 2), xp.arange(3.0)],
    "arange of floats": lambda xp, x, y: [xp.arange(0, 1, 0.1), xp.arange(3, dtype=xp.float32), xp.arange(0.3, 2)],
    "linspace": lambda xp, x, y: [xp.linspace(0, 1, 7), xp.linspace(1, 2, 4, endpoint=False), xp.linspace(3, 4, 1)],
    "linspace in float32": lambda xp, x, y: xp.linspace(0, 1, 7, dtype=xp.float32),
    "eye": lambda xp, x, y: [xp.eye(3), xp.eye(2, 3, k=1), xp.eye(3, 2, k=-1, dtype=xp.int32)],
    "asarray": lambda xp, x, y: [
        xp.asarray(3.5),
        xp.asarray([1.0, 2.0]),
        xp.asarray([[1, 2], [3, 4]], dtype=xp.float32),
    ],
    "nothing": lambda xp, x, y: [xp.asarray([]), xp.zeros((0,))],
    "constants": lambda xp, x, y: [x * xp.pi, x + xp.e, xp.minimum(x, xp.inf), x[xp.newaxis]],
}


@pytest.mark.parametrize("name", SAME)
def test_it_is_numpys(name):
    function = SAME[name]
    if not hasattr(np, "permute_dims"):
        pytest.skip("this NumPy has not the Array API's names")
    found = kernel(lambda x, y: function(x.__array_namespace__(), x, y))(X, Y)
    wanted = function(np, X, Y)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
    for one, other in pairs:
        assert one.dtype == np.asarray(other).dtype
        if name in ("logaddexp", "matmul"):
            np.testing.assert_allclose(one, other, rtol=1e-15)
        else:
            np.testing.assert_array_equal(one, other)


def test_logaddexp_of_infinities():
    values = np.array([-np.inf, np.inf, 0.0, 1000.0])
    found = kernel(lambda x, y: np.logaddexp(x, y))(values[:, None], values)
    np.testing.assert_allclose(found, np.logaddexp(values[:, None], values))


def test_dtypes():
    xp = namespace

    def look(x: Any) -> Any:
        assert x.__array_namespace__(api_version="2024.12") is xp
        assert xp.isdtype(x.dtype, "real floating")
        assert xp.isdtype(x.dtype, ("bool", "numeric"))
        assert not xp.isdtype(x.dtype, ("integral", xp.float32))
        assert xp.isdtype(xp.uint8, xp.uint8)
        assert xp.result_type(x, xp.float32) == np.float64
        assert xp.can_cast(x, xp.float64)
        assert not xp.can_cast(xp.float64, xp.float32)
        assert xp.finfo(xp.float32).bits == 32
        return x

    kernel(look)(X)
    with pytest.raises(TraceError, match="no kind of dtypes"):
        xp.isdtype(xp.float32, "imaginary")
    assert {"exp", "concat", "arange", "atan2", "std"} <= set(dir(xp))
    for name in dir(xp):
        assert hasattr(xp, name)


def test_what_it_has_not():
    with pytest.raises(TraceError, match=r"test_namespace\.py.*argmax of the Array API"):
        kernel(lambda x: x.__array_namespace__().argmax(x))(X)
    assert not hasattr(namespace, "no_such_name")
    for wrong in (lambda x, xp: xp.arange(x.sum()), lambda x, xp: xp.arange(0, 1, 0), lambda x, xp: xp.arange("a")):
        with pytest.raises(TraceError, match=r"arange|end or step"):
            kernel(lambda x, wrong=wrong: wrong(x, namespace), static="wrong")(X)


def test_tiles_of_many_dimensions():
    x = np.arange(12.0).reshape(1, 2, 3, 2, 1)
    tiled = kernel(lambda x: [np.tile(x, (1, 2, 1, 3, 2)), np.tile(x, (0, 1, 1, 1, 1))])(x)
    np.testing.assert_array_equal(tiled[0], np.tile(x, (1, 2, 1, 3, 2)))
    assert tiled[1].shape == (0, 2, 3, 2, 1)


METHODS: dict[str, Any] = {
    "reductions": lambda x: [x.sum(0), x.prod(), x.max(1), x.min(), x.any(0), x.all(), x.mean(1), x.var(), x.std(0)],
    "moves": lambda x: [x.reshape((4, 3)), x.ravel(), x.flatten(), x.transpose(), x.transpose(1, 0), x.swapaxes(0, 1)],
    "more": lambda x: [x.squeeze(), x.clip(-0.1, 0.1), x.round(), x.copy(), x.dot(x.T), x.transpose((1, 0))],
    "operators": lambda x: [+x, -x, abs(x), x**2, x**0.5, x**-1, x**3, 2**x, x // 2, x % 0.5, 1 % x, 3 // x, 1 / x],
    "divmod": lambda x: [*divmod(x, 0.3), *divmod(1, x)],
    "matmul": lambda x: [x @ x.T, x.T @ x[:, 0]],
    "integers": lambda x: [
        (x * 9).astype("int32") ** 2,
        1 << (x > 0).astype("int8"),
        ~(x > 0),
        3 & (x > 0),
        1 | (x > 0),
    ],
    "shifts": lambda x: [(x * 99).astype("int16") >> 2, 5 >> (x > 0).astype("int8"), True ^ (x > 0)],
    "comparisons": lambda x: [x == 0, x != 0, x <= 0.1, x >= 0.1, x > 0],
    "NumPy": lambda x: [np.add.reduce(x), np.maximum.reduce(x, axis=1), np.full_like(x, 3), np.empty_like(x) * 0],
    "dot": lambda x: [np.dot(x, 2.0), np.dot(x, x.T), np.outer(x[0], x[1]), np.vstack([x[0], x]), np.hstack([x, x])],
    "norm": lambda x: [
        np.linalg.norm(x, axis=1),
        np.linalg.norm(x, "fro"),
        np.linalg.norm(x[0]),
        np.linalg.norm(x > 0),
    ],
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_methods_are_numpys(name):
    function = METHODS[name]
    for one, other in zip(kernel(function)(X), function(X), strict=True):
        assert one.dtype == np.asarray(other).dtype
        np.testing.assert_allclose(one, other, rtol=1e-14)


def test_in_place_operators_keep_shape_and_dtype():
    def change(x: Any, y: Any) -> Any:
        x += y
        x *= 2
        x -= 1
        x /= 3
        x **= 2
        x //= 0.1
        x %= 5
        x @= np.eye(3).astype("float32") if isinstance(x, np.ndarray) else x.__array_namespace__().eye(3, dtype="f4")
        z = (y > 0).astype("int32")
        z <<= 2
        z >>= 1
        z |= 8
        z &= 10
        z ^= 1
        return x, z

    x, y = np.linspace(0, 1, 9, dtype="float32").reshape(3, 3), np.linspace(-1, 1, 3)
    found, wanted = kernel(change)(x, y), change(x.copy(), y)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6)

    def rate(x: Any, n: Any) -> Any:
        n *= 2.5
        return x * n

    assert kernel(rate)(x, 2).dtype == np.float32
