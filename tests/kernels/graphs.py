"""Graphs drawn at random, for properties that hold for every graph; and inputs for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import FLOATS, OPS, TensorType

#: Those whose values stay within what every backend computes alike.
SMOOTH = ("negative", "absolute", "square", "tanh", "sin", "exp", "sqrt", "floor", "sign", "isfinite")
BINARY = ("add", "subtract", "multiply", "maximum", "minimum", "divide", "less", "greater_equal")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = ("float32", "float64", "int32", "bool")


@st.composite
def graphs(draw: st.DrawFn, *, dtypes: tuple[str, ...] = DTYPES, nodes_max_count: int = 12) -> Graph:
    """Return a graph of up to ``nodes_max_count`` operations of every kind."""
    shape = draw(SHAPES)
    inputs = [TensorType(shape, draw(st.sampled_from(dtypes)))]
    for _ in range(draw(st.integers(0, 2))):
        inputs.append(TensorType(draw(st.sampled_from([shape, shape[1:], (), (3, 4)])), draw(st.sampled_from(dtypes))))
    builder = GraphBuilder(inputs)
    values = list(range(len(inputs)))
    for _ in range(draw(st.integers(1, nodes_max_count))):
        try:
            values.append(_add(draw, builder, values))
        except KernelError:
            # Shapes or dtypes that do not fit each other.
            continue
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    if draw(st.booleans()):
        outputs.append(values[-1])
    return builder.finish(outputs)


def _add(draw: st.DrawFn, builder: GraphBuilder, values: list[int]) -> int:
    one, other = draw(st.sampled_from(values)), draw(st.sampled_from(values))
    shape = builder.type_of(one).shape
    match draw(st.sampled_from(("unary", "binary", "scalar", "reduce", "move", "where", "matmul", "join", "source"))):
        case "unary":
            return builder.elementwise(draw(st.sampled_from(SMOOTH)), one)
        case "binary":
            return builder.elementwise(draw(st.sampled_from(BINARY)), one, other)
        case "scalar":
            return builder.elementwise(draw(st.sampled_from(BINARY)), one, WeakScalar(draw(st.sampled_from([2, 0.5]))))
        case "reduce":
            axes = draw(st.lists(st.integers(0, max(len(shape) - 1, 0)), unique=True, max_size=2)) if shape else []
            op = draw(st.sampled_from(("sum", "max", "min", "prod")))
            return builder.reduce(op, one, axes, keepdims=draw(st.booleans()))
        case "where":
            return builder.elementwise("where", builder.elementwise("less", one, WeakScalar(1)), other, one)
        case "matmul":
            return builder.matmul(one, builder.transpose(one) if draw(st.booleans()) else other)
        case "join":
            return builder.add("concatenate", one, one, axes=(draw(st.integers(0, max(len(shape) - 1, 0))),))
        case "source":
            if draw(st.booleans()):
                return builder.constant(draw(st.sampled_from([0.0, -1.5, 3, True])))
            return builder.add("iota", shape=(*shape, 3), dtype="float32", axes=(len(shape),))
    return _move(draw, builder, one)


def _move(draw: st.DrawFn, builder: GraphBuilder, one: int) -> int:
    shape = builder.type_of(one).shape
    match draw(st.sampled_from(("transpose", "reshape", "broadcast", "slice", "place"))):
        case "transpose":
            return builder.transpose(one, draw(st.permutations(range(len(shape)))))
        case "reshape":
            return builder.reshape(one, draw(st.sampled_from([(builder.type_of(one).size,), (1, *shape), shape[::-1]])))
        case "broadcast":
            return builder.broadcast(one, (2, *shape))
        case "slice":
            starts, steps, counts = [], [], []
            for length in shape:
                step = draw(st.sampled_from([1, 2, -1]))
                start = draw(st.integers(0, max(length - 1, 0)))
                room = (length - start + step - 1) // step if step > 0 else start + 1
                counts.append(draw(st.integers(0, max(room, 0))) if length else 0)
                starts.append(start)
                steps.append(step)
            return builder.add("slice", one, shape=tuple(counts), starts=tuple(starts), steps=tuple(steps))
    larger = tuple(2 * length + 1 for length in shape)
    return builder.add("place", one, shape=larger, starts=(1,) * len(shape), steps=(2,) * len(shape))


def inputs_for(graph: Graph, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Return arrays that ``graph`` takes, of small numbers."""
    source = np.random.default_rng(seed)
    arrays = []
    for tensor in graph.inputs:
        drawn = np.asarray(source.standard_normal(tensor.shape) * 2)
        arrays.append((drawn > 0) if tensor.dtype == "bool" else drawn.astype(tensor.dtype))
    return arrays


def is_transcendental(graph: Graph) -> bool:
    """Whether results may differ in their last bits between correct ways to compute them."""
    return any(OPS[node.op].flops > 1 or node.op in ("matmul", "sum", "prod") for node in graph.nodes)


def bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return whole numbers that differ if the elements do: zeros by their signs; all NaN are one."""
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), np.nan, array).astype(array.dtype)
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def values(dtype: str, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return numbers of all sizes, and those that are special."""
    source = np.random.default_rng(seed)
    if dtype == "bool":
        return source.random(count) < 0.5
    if dtype not in FLOATS:
        info = np.iinfo(dtype)
        low, high = max(int(info.min), -100), min(int(info.max), 100)
        return source.integers(low, high, count, dtype=dtype, endpoint=True)
    drawn = source.standard_normal(count) * 10.0 ** source.integers(-3, 4, count)
    special = source.random(count) < 0.05
    drawn[special] = source.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 1e-40], int(special.sum()))
    return drawn.astype(dtype)
