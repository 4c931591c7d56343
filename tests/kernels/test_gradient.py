"""Gradients are those of finite differences, for every operation and for random graphs of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.gradient import gradient, gradient_graph, value_and_gradient
from sparkle_mesh.kernels.gradient_rules import NOT_DIFFERENTIABLE, RULES
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import OPS, TensorType
from sparkle_mesh.kernels.reference import evaluate
from sparkle_mesh.kernels.tracing import kernel

Array = np.ndarray[Any, Any]
STEP = 1e-6


def f64(*shape: int) -> TensorType:
    return TensorType(shape, "float64")


def differences(graph: Graph, inputs: list[Array], number: int) -> Array:
    """Return by how much the first output changes with each element of one input."""
    found = np.empty(inputs[number].shape)
    for place in np.ndindex(found.shape):
        sides = []
        for sign in (1, -1):
            moved = [array.copy() for array in inputs]
            moved[number][place] += sign * STEP
            sides.append(evaluate(graph, moved)[0])
        found[place] = (sides[0] - sides[1]) / (2 * STEP)
    return found


def summed(builder: GraphBuilder, number: int) -> Graph:
    """Return a graph of one float, in which each element of ``number`` has a weight of its own."""
    tensor = builder.type_of(number)
    flat = builder.reshape(number, (tensor.size,))
    places = builder.add("iota", shape=(tensor.size,), dtype="float64", axes=(0,))
    weights = builder.elementwise("add", builder.elementwise("multiply", places, WeakScalar(0.37)), WeakScalar(0.5))
    return builder.finish([builder.reduce("sum", builder.elementwise("multiply", flat, weights))])


def assert_gradients(graph: Graph, inputs: list[Array]) -> None:
    wanted = [differences(graph, inputs, number) for number in range(len(inputs))]
    found = evaluate(gradient_graph(graph, range(len(inputs))), inputs)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


# --- Each operation ---------------------------------------------------------------------------

# Where the function has a derivative, if that is not everywhere: the middle of a range, and half its width.
RANGES = {"arcsin": (0, 0.8), "arccos": (0, 0.8), "arctanh": (0, 0.8), "arccosh": (2.5, 1)}
RANGES |= dict.fromkeys(("sqrt", "log", "log2", "log10", "log1p", "reciprocal", "power"), (1.5, 1))
UNARY = sorted(name for name, op in OPS.items() if op.kind == "elementwise" and op.arity == 1 and name in RULES)
BINARY = sorted(name for name, op in OPS.items() if op.kind == "elementwise" and op.arity == 2 and name in RULES)


def drawn(name: str, seed: int, *shape: int) -> Array:
    middle, width = RANGES.get(name, (0, 2))
    return np.asarray(np.random.default_rng(seed).uniform(middle - width, middle + width, shape))


@pytest.mark.parametrize("name", [name for name in UNARY if name != "cast"])
def test_unary(name):
    builder = GraphBuilder([f64(4, 3)])
    assert_gradients(summed(builder, builder.elementwise(name, 0)), [drawn(name, 0, 4, 3)])


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    builder = GraphBuilder([f64(4, 3), f64(3)])
    graph = summed(builder, builder.elementwise(name, 0, 1))
    assert_gradients(graph, [drawn(name, 0, 4, 3), drawn(name, 1, 3)])


@pytest.mark.parametrize("name", BINARY)
def test_binary_with_itself(name):
    builder = GraphBuilder([f64(5)])
    if name in ("floor_divide", "remainder", "divide"):
        return
    graph = summed(builder, builder.elementwise(name, 0, 0))
    if name in ("maximum", "minimum"):
        # Both halves come together again.
        np.testing.assert_allclose(evaluate(gradient_graph(graph, [0]), [np.ones(5)])[0], np.arange(5) * 0.37 + 0.5)
    assert_gradients(graph, [drawn(name, 0, 5)])


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", ["sum", "prod", "max", "min"])
def test_reductions(name, axes):
    builder = GraphBuilder([f64(2, 3, 4)])
    graph = summed(builder, builder.add(name, 0, axes=axes))
    assert_gradients(graph, [drawn(name, 0, 2, 3, 4)])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_products_with_zeros(count, zeros):
    builder = GraphBuilder([f64(3, count)])
    graph = summed(builder, builder.reduce("prod", 0, [1]))
    value = drawn("prod", 3, 3, count)
    value[:, :zeros] = 0
    assert_gradients(graph, [value])


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((3, 4), (4, 2)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((4,), (4, 2)), ((4,), (4,))],
)
def test_matmul(shape_a, shape_b):
    builder = GraphBuilder([f64(*shape_a), f64(*shape_b)])
    assert_gradients(summed(builder, builder.matmul(0, 1)), [drawn("", 0, *shape_a), drawn("", 1, *shape_b)])


MOVES: dict[str, Callable[[GraphBuilder], int]] = {
    "reshape": lambda b: b.reshape(0, (2, 6)),
    "transpose": lambda b: b.transpose(0, (1, 0)),
    "broadcast": lambda b: b.broadcast(b.reshape(0, (4, 1, 3)), (2, 4, 5, 3)),
    "slice": lambda b: b.add("slice", 0, shape=(2, 2), starts=(3, 0), steps=(-2, 2)),
    "place": lambda b: b.add("place", 0, shape=(9, 3), starts=(8, 0), steps=(-2, 1)),
    "concatenate": lambda b: b.add("concatenate", 0, b.elementwise("square", 0), 0, axes=(1,)),
    "where": lambda b: b.elementwise("where", b.elementwise("less", 0, WeakScalar(0.1)), b.elementwise("sin", 0), 0),
    "cast": lambda b: b.cast(b.elementwise("multiply", b.cast(0, "float64"), 0), "float64"),
}


@pytest.mark.parametrize("name", MOVES)
def test_movements(name):
    builder = GraphBuilder([f64(4, 3)])
    assert_gradients(summed(builder, MOVES[name](builder)), [drawn("", 0, 4, 3)])


def test_every_operation_has_a_rule_or_no_derivative():
    assert set(OPS) == set(RULES) | NOT_DIFFERENTIABLE
    assert not set(RULES) & NOT_DIFFERENTIABLE
    tested = {*UNARY, *BINARY, *MOVES, "sum", "prod", "max", "min", "matmul", "constant", "iota", "input"}
    assert set(RULES) == tested


# --- Random graphs ----------------------------------------------------------------------------


@st.composite
def smooth_graphs(draw: st.DrawFn) -> Graph:
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    builder = GraphBuilder([f64(*shape), f64(*shape[1:])])
    values = [0, 1]
    for _ in range(draw(st.integers(1, 8))):
        one, other = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        rank = len(builder.type_of(one).shape)
        try:
            match draw(st.sampled_from(["unary", "binary", "safe", "reduce", "matmul", "move", "choose"])):
                case "unary":
                    found = builder.elementwise(
                        draw(st.sampled_from(["tanh", "sin", "cos", "arctan", "negative"])), one
                    )
                case "binary":
                    found = builder.elementwise(draw(st.sampled_from(["add", "subtract", "multiply"])), one, other)
                case "safe":
                    positive = builder.elementwise("add", builder.elementwise("square", one), WeakScalar(1.0))
                    op = draw(st.sampled_from(["sqrt", "log", "reciprocal", "power", "divide"]))
                    bounded = builder.elementwise("tanh", other)
                    operands = {"power": (positive, bounded), "divide": (bounded, positive)}.get(op, (positive,))
                    found = builder.elementwise(op, *operands)
                case "reduce":
                    axes = draw(st.lists(st.integers(0, max(rank - 1, 0)), unique=True)) if rank else []
                    found = builder.reduce(draw(st.sampled_from(["sum", "prod"])), one, axes)
                case "matmul":
                    found = builder.matmul(builder.elementwise("tanh", one), builder.transpose(one))
                case "move":
                    found = builder.transpose(builder.add("concatenate", one, one, axes=(rank - 1,)))
                case "choose":
                    found = builder.elementwise("where", builder.elementwise("less", one, WeakScalar(0.3)), one, other)
        except KernelError:
            continue
        if builder.type_of(found).size <= 64:
            values.append(found)
    return summed(builder, builder.elementwise("tanh", builder.elementwise("multiply", values[-1], WeakScalar(0.2))))


@settings(max_examples=150, deadline=None)
@given(smooth_graphs(), st.integers(0, 100))
def test_random_graphs(graph, seed):
    inputs = [drawn("", seed + number, *tensor.shape) for number, tensor in enumerate(graph.inputs)]
    assert_gradients(graph, inputs)


@settings(max_examples=60, deadline=None)
@given(smooth_graphs(), st.integers(0, 100))
def test_second_derivatives_of_random_graphs(graph, seed):
    inputs = [drawn("", seed + number, *tensor.shape) for number, tensor in enumerate(graph.inputs)]
    first = gradient_graph(graph, [0])
    builder = GraphBuilder(first.inputs)
    slope = builder.inline(first, range(len(inputs)))[first.outputs[0]]
    assert_gradients(summed(builder, slope), inputs)


# --- Where there is no derivative -----------------------------------------------------------------


def test_ties_share_evenly():
    relu = gradient(lambda x: np.maximum(x, 0).sum())
    np.testing.assert_array_equal(relu(np.array([-1.0, 0.0, 2.0])), [0, 0.5, 1])
    top = gradient(lambda x: x.max())
    np.testing.assert_array_equal(top(np.array([3.0, 1.0, 3.0])), [0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("function", "place", "wanted"),
    [
        (lambda x: x**2.0, 0.0, 0.0),
        (lambda x: x**0, 0.0, 0.0),
        (lambda x: x**1.0, 0.0, 1.0),
        (lambda x: x**3, -2.0, 12.0),
        (lambda x: x ** (x * 0), 0.0, 0.0),
        (lambda x: 2.0**x, 3.0, 8 * np.log(2)),
        (lambda x: 0.0**x, 2.0, 0.0),
        (lambda x: abs(x), 0.0, 0.0),
        (lambda x: np.hypot(x, 0.0), 0.0, 0.0),
        (lambda x: np.arctan2(x, x), 0.0, 0.0),
        (lambda x: np.floor(x) * x, 1.5, 1.0),
        (lambda x: np.where(x > 0, np.log(np.where(x > 0, x, 1)), 0), -1.0, 0.0),
        (lambda x: x.astype("int32") * 2.0, 1.5, 0.0),
        (lambda x: x * 0 + 3, 1.5, 0.0),
    ],
)
def test_awkward_places(function, place, wanted):
    found = gradient(lambda x: function(x) + 0.0 * x)(np.float64(place))
    np.testing.assert_allclose(found, wanted)


def test_gradients_of_what_does_not_depend_are_zeros():
    found = gradient(lambda x, y: (x * 2).sum(), argnums=("y", 0))(np.ones(3), np.ones((2, 2), "float32"))
    np.testing.assert_array_equal(found[0], np.zeros((2, 2)))
    assert found[0].dtype == np.float32
    np.testing.assert_array_equal(found[1], [2, 2, 2])


def test_dtypes_are_those_of_the_inputs():
    slopes = gradient(lambda x, y: (x * y).mean(), argnums=(0, 1))
    x, y = slopes(np.ones(3, "float32"), np.ones(3, "float16"))
    assert (x.dtype, y.dtype) == (np.float32, np.float16)


# --- As kernels -----------------------------------------------------------------------------------


def test_value_and_gradient_of_a_structure():
    @kernel
    def loss(parameters, x):
        return ((x @ parameters["w"] + parameters["b"]) ** 2).mean()

    parameters = {"w": np.ones((2, 1)), "b": np.zeros(1)}
    value, slopes = value_and_gradient(loss)(parameters, np.array([[1.0, 2.0]]))
    assert float(value) == 9.0
    np.testing.assert_allclose(slopes["w"], [[6], [12]])
    np.testing.assert_allclose(slopes["b"], [6])
    np.testing.assert_array_equal(gradient(loss, "parameters")(parameters, np.array([[1.0, 2.0]]))["w"], slopes["w"])


def test_what_is_beside_the_float_is_handed_back():
    @kernel
    def loss(x):
        y = x * x
        return y.sum(), {"y": y, "count": 3, "name": "squares"}

    x = np.array([1.0, 2.0])
    slope, beside = gradient(loss, has_aux=True)(x)
    np.testing.assert_array_equal(slope, [2, 4])
    np.testing.assert_array_equal(beside["y"], [1, 4])
    assert beside["name"] == "squares"
    (value, beside), slope = value_and_gradient(loss, has_aux=True)(x)
    assert (float(value), int(beside["count"])) == (5.0, 3)
    np.testing.assert_array_equal(slope, [2, 4])


def test_gradients_of_gradients():
    third = gradient(gradient(gradient(lambda x: x**4)))
    np.testing.assert_allclose(third(np.float64(2.0)), 48)
    curvature = gradient(lambda x: (gradient(lambda x: np.sin(x).sum())(x)).sum())
    np.testing.assert_allclose(curvature(np.array([0.3, 1.0])), -np.sin([0.3, 1.0]))


def test_numbers_have_gradients():
    slope = gradient(lambda x, rate: (x * rate).sum(), "rate")
    np.testing.assert_allclose(slope(np.ones(3, "float32"), 0.5), 3)
    # It takes part as a float, and is one then.
    np.testing.assert_allclose(slope(np.ones(3, "float32"), 2), 3)
    with pytest.raises(KernelError, match=r"rate .*int64"):
        slope(np.ones(3, "float32"), np.int64(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradient(lambda x: x)(np.ones(3)), r"one float.*float64\[3\].*sum or mean"),
        (lambda: gradient(lambda x: (x * 1.0).sum())(np.ones(3, "int32")), "x .*int32.*floats"),
        (lambda: gradient(lambda x: x.sum() > 0)(np.ones(3)), "one float"),
        (lambda: gradient(lambda x: {"loss": x.sum()})(np.ones(3)), "structure"),
        (lambda: gradient(lambda x: x.sum(), has_aux=True)(np.ones(3)), "pair"),
        (lambda: gradient(lambda x: x.sum(), 1), "no argument 1"),
        (lambda: gradient(lambda x: x.sum(), "y"), "no argument 'y'"),
        (lambda: gradient(lambda x: x.sum(), ()), "names no argument"),
        (lambda: gradient(lambda x, axis: x.sum(axis), "axis")(np.ones(3), None), "no arrays"),
    ],
)
def test_what_has_no_gradient(make, message):
    with pytest.raises(KernelError, match=message):
        make()


def test_graphs_without_one_float_are_refused():
    builder = GraphBuilder([f64(3), TensorType((), "int32")])
    graph = builder.finish([0, builder.reduce("sum", 0)])
    with pytest.raises(KernelError, match="output 0"):
        gradient_graph(graph, [0])
    with pytest.raises(KernelError, match="input 1"):
        gradient_graph(graph, [1], output=1)
    assert gradient_graph(graph, [0], output=1, keep=[1]).output_types == (f64(), f64(3))


def test_seeds_cost_nothing():
    graph = kernel(lambda x: np.tanh(x).sum()).trace(f64(5))
    ops = [node.op for node in gradient_graph(graph, [0]).nodes]
    # 1 - tanh(x) ** 2: nothing is multiplied by the gradient of the sum, which is 1.
    assert ops.count("multiply") == 0
    assert len(fuse(gradient_graph(graph, [0])).steps) == 1


# --- A model --------------------------------------------------------------------------------------


@kernel
def cross_entropy(parameters, x, labels):
    """The mean loss of a perceptron of two layers; ``labels`` are one-hot."""
    hidden = np.maximum(x @ parameters[0]["w"] + parameters[0]["b"], 0)
    scores = hidden @ parameters[1]["w"] + parameters[1]["b"]
    scores = scores - scores.max(axis=1, keepdims=True)
    logarithms = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return -(logarithms * labels).sum(axis=1).mean()


def model(seed: int, dtype: str = "float64") -> tuple[Any, Array, Array]:
    source = np.random.default_rng(seed)
    sizes = (6, 8, 3)
    parameters = [
        {"w": (source.standard_normal((a, b)) / np.sqrt(a)).astype(dtype), "b": np.zeros(b, dtype)}
        for a, b in pairwise(sizes)
    ]
    x = source.standard_normal((16, 6)).astype(dtype)
    labels = np.eye(3, dtype=dtype)[(x[:, 0] > 0).astype(int) + (x[:, 1] > 0)]
    return parameters, x, labels


def test_gradients_of_a_model():
    parameters, x, labels = model(0)
    call = cross_entropy.prepare(parameters, x, labels)
    slopes = gradient(cross_entropy)(parameters, x, labels)
    for layer, found in enumerate(slopes):
        for place, name in enumerate(("b", "w")):
            wanted = differences(call.graph, list(call.operands), 2 * layer + place)
            np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-7)


def test_training_lowers_the_loss():
    parameters, x, labels = model(1, "float32")

    @kernel
    def step(parameters, x, labels, rate):
        loss, slopes = value_and_gradient(cross_entropy)(parameters, x, labels)
        moved = [
            {name: layer[name] - rate * slope[name] for name in layer}
            for layer, slope in zip(parameters, slopes, strict=True)
        ]
        return loss, moved

    losses = []
    for turn in range(60):
        loss, parameters = step(parameters, x, labels, 0.5 / (1 + turn / 100))
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert parameters[0]["w"].dtype == np.float32
    # Another rate is no new trace.
    assert len(step._traces) == 1
