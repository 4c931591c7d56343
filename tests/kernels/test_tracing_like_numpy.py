"""What is traced gives NumPy's results, bit by bit: random programs of NumPy's functions, run on both."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh.kernels.tracing import kernel

Step = tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...], dict[str, Any]]
DTYPES = ("float64", "float32", "float16", "int32", "int8", "uint8", "bool")


def assigned_sum(x: Any, y: Any) -> Any:
    x = np.copy(x)
    x += y
    return x


def assigned_product(x: Any, y: Any) -> Any:
    x = np.copy(x)
    x *= y
    return x


UNARY = (np.tanh, np.exp, np.negative, np.abs, np.square, np.sqrt, np.floor, np.sign, np.isnan, np.logical_not, abs)
UNARY += (operator.neg, operator.invert, np.rint, np.positive, np.copy, np.ravel, np.zeros_like, np.ones_like)
BINARY = (np.add, np.multiply, np.maximum, np.divide, np.less, np.hypot, np.power, np.floor_divide, np.logical_and)
BINARY += (operator.add, operator.sub, operator.mul, operator.truediv, operator.gt, operator.eq, operator.mod)
BINARY += (operator.and_, operator.or_, assigned_sum, assigned_product, np.copysign, np.arctan2)
REDUCTIONS = (np.sum, np.prod, np.max, np.amin, np.mean, np.var, np.std, np.any, np.all)
KEYS = (0, -1, None, ..., slice(None), slice(None, None, -1), slice(1, None, 2), slice(-1, 0, -2), slice(5, 2))
NUMBERS = (0, 1, 2, -1, 3, 0.5, 2.0, -1.5, True, np.float32(0.1), np.int16(3))


MOVES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (np.transpose, ()),
    (np.reshape, (-1,)),
    (np.expand_dims, (1,)),
    (np.squeeze, ()),
    (np.swapaxes, (0, -1)),
    (np.moveaxis, (0, 1)),
    (np.flip, (0,)),
    (np.roll, (2, 0)),
    (np.roll, (1,)),
    (np.repeat, (2, 0)),
    (np.tile, ((2, 1),)),
    (np.tril, ()),
    (np.triu, (1,)),
    (np.diff, ()),
    (np.broadcast_to, ((2, 3, 4),)),
    (np.outer, (2.0,)),
    (operator.methodcaller("astype", "float32"), ()),
    (operator.methodcaller("astype", np.int64), ()),
    (operator.methodcaller("reshape", 2, -1), ()),
    (operator.methodcaller("sum", axis=0), ()),
    (operator.methodcaller("mean"), ()),
    (operator.attrgetter("T"), ()),
]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    places = st.integers(0, 30)
    one, other = draw(places), draw(places)
    axis = draw(st.sampled_from([None, 0, 1, -1, (0, 1)]))
    match draw(st.sampled_from(["unary", "binary", "number", "reduce", "index", "move", "join", "choose"])):
        case "unary":
            return draw(st.sampled_from(UNARY)), (one,), (), {}
        case "binary":
            return draw(st.sampled_from(BINARY)), (one, other), (), {}
        case "number":
            function = draw(st.sampled_from((*BINARY, operator.pow, np.where)))
            number = draw(st.sampled_from(NUMBERS))
            if function is np.where:
                return (lambda x, n: np.where(x > n, n, x)), (one,), (number,), {}
            if draw(st.booleans()) and function not in (assigned_sum, assigned_product):
                return (lambda x, n: function(n, x)), (one,), (number,), {}
            return function, (one,), (number,), {}
        case "reduce":
            return draw(st.sampled_from(REDUCTIONS)), (one,), (), {"axis": axis, "keepdims": draw(st.booleans())}
        case "index":
            key = tuple(draw(st.lists(st.sampled_from(KEYS), max_size=3)))
            return operator.getitem, (one,), (key if len(key) != 1 else key[0],), {}
        case "join":
            function = draw(st.sampled_from([np.concatenate, np.stack, np.vstack, np.hstack]))
            keywords = {"axis": draw(st.sampled_from([0, 1, -1]))} if function in (np.concatenate, np.stack) else {}
            return (lambda a, b, **keywords: function([a, b], **keywords)), (one, other), (), keywords
        case "choose":
            if draw(st.booleans()):
                return np.clip, (one,), (-1, draw(st.sampled_from([1, 2.5]))), {}
            return (lambda a, b: np.where(a < b, a, b)), (one, other), (), {}
    function, arguments = draw(st.sampled_from(MOVES))
    return function, (one,), arguments, {}


def run(program: list[Step], inputs: list[Any]) -> list[Any]:
    values = list(inputs)
    for function, places, arguments, keywords in program:
        result = function(*(values[place % len(values)] for place in places), *arguments, **keywords)
        # NumPy's scalars are computed with by other code than its arrays, to other last bits.
        values.append(np.asarray(result) if isinstance(result, np.generic) else result)
    return values[len(inputs) :]


def working(program: list[Step], inputs: list[Any]) -> list[Step]:
    """Return the steps that NumPy takes, and kernels compute with: no float128, no arrays that are too large."""
    values, kept = list(inputs), []
    for function, places, arguments, keywords in program:
        operands = [values[place % len(values)] for place in places]
        if keywords.get("axis") is not None and not all(map(np.ndim, operands)):
            # NumPy takes axis 0 of what has none.
            continue
        if not np.ndim(operands[0]) and (function is np.repeat or isinstance(function, operator.methodcaller)):
            continue
        if function in (np.tril, np.triu) and np.ndim(operands[0]) < 2:
            continue
        try:
            result = function(*operands, *arguments, **keywords)
        except (ValueError, TypeError, IndexError, OverflowError, np.exceptions.AxisError):
            continue
        if np.asarray(result).size > 5000 or np.asarray(result).ndim > 6:
            continue
        # Places are told anew, because steps were left out.
        kept.append((function, tuple(place % len(values) for place in places), arguments, keywords))
        values.append(np.asarray(result))
    return kept


@settings(max_examples=300)
@given(
    st.lists(steps(), min_size=1, max_size=10),
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=3),
    st.integers(0, 3),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_programs_give_numpys_bits(program, inputs, seed):
    source = np.random.default_rng(seed)
    arrays = []
    for shape, dtype in inputs:
        drawn = np.asarray(source.standard_normal(shape) * 3)
        arrays.append(drawn > 0 if dtype == "bool" else (drawn if dtype[0] == "f" else np.abs(drawn)).astype(dtype))
    program = working(program, arrays)
    if not program:
        return
    wanted = run(program, [array.copy() for array in arrays])
    found = kernel(lambda *operands: run(program, list(operands)))(*arrays)
    for step, one, other in zip(program, found, wanted, strict=True):
        other = np.asarray(other)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), step
        np.testing.assert_array_equal(one, other, err_msg=str(step))
