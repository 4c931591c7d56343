"""Any bytes are a kernel that runs within what was measured, or a ProtocolError, and nothing else."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh.errors import KernelError, ProtocolError
from sparkle_mesh.kernels.accounting import measure, peak_bytes, reference_bytes
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder
from sparkle_mesh.kernels.ops import DTYPES, OPS, Scalar, TensorType
from sparkle_mesh.kernels.program import blocks_written
from sparkle_mesh.kernels.reference import evaluate
from sparkle_mesh.kernels.wire_form import (
    KernelBounds,
    declare,
    decode_graph,
    decode_kernel,
    encode_graph,
    encode_kernel,
    graph_digest,
)
from tests.kernels.graphs import graphs, inputs_for
from tests.kernels.test_fusion import run
from tests.kernels.test_wire_form import NUMBERS, every_code, every_form, softmax

SMALL = KernelBounds(max_flops=10**6, max_bytes=10**6, max_memory_bytes=10**5, max_nodes=200, max_elements=10**5)
# What is run here.
RUN_MAX_BYTES = 1 << 20
# What Python's own objects take beside arrays: frames, array headers, tuples, ufuncs' buffers.
PYTHON_BYTES = 64 * 1024
PYTHON_BYTES_PER_NODE = 4096
SEEDS = [encode_graph(make()) for make in (every_form, every_code, softmax)]


def accepted(data: bytes) -> Graph | None:
    """Return the graph that ``data`` is taken for, once it has been shown to keep what is promised."""
    try:
        graph = decode_graph(data, bounds=SMALL)
    except ProtocolError:
        return None
    assert encode_graph(graph) == data
    demand = measure(graph)
    assert demand.flops <= SMALL.max_flops
    assert demand.memory_bytes <= SMALL.max_memory_bytes
    assert demand.moved_bytes <= SMALL.max_bytes
    if reference_bytes(graph) <= RUN_MAX_BYTES:
        assert_runs(graph)
    return graph


def assert_runs(graph: Graph) -> None:
    """Run ``graph`` as it is and fused, within the memory that is said."""
    inputs = inputs_for(graph)
    tracemalloc.start()
    try:
        wanted = evaluate(graph, inputs)
        _, peak = tracemalloc.get_traced_memory()
    except KernelError as error:
        assert "negative exponent" in str(error)  # noqa: PT017
        return
    finally:
        tracemalloc.stop()
    allowed = PYTHON_BYTES + PYTHON_BYTES_PER_NODE * len(graph.nodes)
    assert peak + sum(array.nbytes for array in inputs) <= reference_bytes(graph) + allowed
    assert [TensorType(array.shape, array.dtype.name) for array in wanted] == list(graph.output_types)
    program = fuse(graph)
    for one, other in zip(run(program, inputs), wanted, strict=True):
        assert (one.size, one.dtype) == (other.size, other.dtype)
    new = [program.blocks[block].nbytes for step in program.steps for block in blocks_written(step)]
    assert peak_bytes(program) <= sum(array.nbytes for array in inputs) + sum(new)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_garbage(data: bytes) -> None:
    accepted(data)
    accepted(b"\x93\x01" + data)
    try:
        decode_kernel(data)
    except ProtocolError:
        return
    raise AssertionError(data)


def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Return ``data`` with one thing changed that says nothing to MessagePack."""
    start, stop = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    match draw(st.sampled_from(("flip", "byte", "cut", "drop", "repeat", "put", "swap"))):
        case "flip":
            place = min(start, len(data) - 1)
            return data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        case "byte":
            return data[:start] + draw(st.binary(min_size=1, max_size=1)) + data[start + 1 :]
        case "cut":
            return data[:start]
        case "drop":
            return data[:start] + data[stop:]
        case "repeat":
            return data[:stop] + data[start:stop] + data[stop:]
        case "put":
            return data[:start] + draw(st.binary(min_size=1, max_size=9)) + data[start:]
    middle = (start + stop) // 2
    return data[:start] + data[middle:stop] + data[start:middle] + data[stop:]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = draw(st.one_of(st.sampled_from(SEEDS), graphs().map(encode_graph)))
    for _ in range(draw(st.integers(1, 3))):
        data = changed(draw, data) or b"\0"
    return data


@settings(max_examples=200, deadline=None)
@given(mutated())
def test_mutated_bytes(data: bytes) -> None:
    accepted(data)


HUGE = st.sampled_from([2**63, 2**64 - 1, -(2**63), 2**40, 2**40 + 1, 2**31, -(2**31), 4096, 4095, 255, 128, -1])
LEAVES = st.one_of(
    st.integers(-3, 70),
    HUGE,
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.just(msgspec.msgpack.Ext(5, b"e")),
)
THINGS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=10),
        st.dictionaries(st.text(max_size=2), inner, max_size=2),
        inner.map(lambda one: [one]),
    ),
    max_leaves=8,
)


@st.composite
def confused(draw: st.DrawFn) -> bytes:
    """Return a valid encoding with other things in some places, whatever these hold."""
    message: list[Any] = msgspec.msgpack.decode(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 3))):
        inner: list[Any] = message
        while True:
            if not inner:
                inner.append(draw(THINGS))
                break
            place = draw(st.integers(0, len(inner) - 1))
            if isinstance(inner[place], list) and draw(st.integers(0, 9)):
                inner = inner[place]
                continue
            match draw(st.sampled_from(("replace", "nudge", "delete", "repeat", "swap"))):
                case "replace":
                    inner[place] = draw(THINGS)
                case "nudge" if isinstance(inner[place], int):
                    inner[place] += draw(st.sampled_from([-1, 1]))
                case "delete":
                    del inner[place]
                case "repeat":
                    inner.insert(place, inner[place])
                case _:
                    other = draw(st.integers(0, len(inner) - 1))
                    inner[place], inner[other] = inner[other], inner[place]
            break
    return msgspec.msgpack.encode(message)


@settings(max_examples=200, deadline=None)
@given(confused())
def test_confused_types(data: bytes) -> None:
    accepted(data)


def test_nesting_of_any_depth() -> None:
    for depth in (10, 100, 1000, 10_000, 200_000):
        for opening in (b"\x91", b"\x81\x00", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01"):
            nested = opening * (depth // len(opening)) + b"\x00"
            for start in (b"", b"\x93\x01", b"\x93\x01\x91", b"\x93\x01\x91\x93\x00", b"\x93\x02"):
                assert accepted(start + nested) is None


def test_lengths_that_are_not_there() -> None:
    for length in (1, 2**16 - 1, 2**31, 2**32 - 1):
        for code in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"):
            for start in (b"", b"\x93\x01", b"\x93\x01\x91\x93\x00\x0a"):
                assert accepted(start + code + struct.pack(">I", length)) is None


# --- Graphs of any operations ---------------------------------------------------------------------

VALUES: list[Scalar] = [value for value, _ in NUMBERS]
LENGTHS = st.integers(0, 4)
SHAPES = st.lists(LENGTHS, max_size=4).map(tuple)
ANYWHERE = st.sampled_from([*OPS][1:])


@st.composite
def wild_graphs(draw: st.DrawFn) -> Graph:
    """Return a graph of every operation and dtype, with any fields that are taken."""
    shape = draw(SHAPES)
    builder = GraphBuilder([TensorType(shape, draw(st.sampled_from(DTYPES))) for _ in range(draw(st.integers(1, 3)))])
    values = [0]
    for _ in range(draw(st.integers(1, 25))):
        try:
            values.append(_add(draw, builder, values))
        except KernelError:
            # Shapes or dtypes that do not fit each other.
            continue
    return builder.finish([values[-1], *draw(st.lists(st.sampled_from(values), max_size=3))])


def _add(draw: st.DrawFn, builder: GraphBuilder, values: list[int]) -> int:
    op = OPS[draw(ANYWHERE)]
    one = draw(st.sampled_from(values))
    arity = draw(st.integers(1, 4)) if op.arity is None else op.arity
    operands = [one if draw(st.integers(0, 3)) else draw(st.sampled_from(values)) for _ in range(arity)]
    if op.name == "where":
        operands[0] = builder.elementwise("isnan", one)
    if op.kind == "elementwise":
        # Of what it takes, where it takes any such.
        if op.name == "cast":
            return builder.add("cast", *operands, dtype=draw(st.sampled_from(DTYPES)))
        return builder.elementwise(op.name, *operands)
    shape = builder.type_of(one).shape
    rank = len(shape)
    wanted = draw(SHAPES)
    match op.name:
        case "constant":
            return builder.add("constant", dtype=draw(st.sampled_from(DTYPES)), value=draw(st.sampled_from(VALUES)))
        case "iota":
            axis = draw(st.integers(0, 3))
            return builder.add("iota", shape=wanted, dtype=draw(st.sampled_from(DTYPES)), axes=(axis,))
        case "reshape" | "broadcast":
            fitting = [(builder.type_of(one).size,), (1, *shape), (2, *shape), shape[::-1]]
            return builder.add(op.name, *operands, shape=draw(st.sampled_from([*fitting, wanted])))
        case "slice" | "place":
            numbers = st.lists(st.integers(-2, 3), min_size=rank, max_size=rank).map(tuple)
            # As long, shorter or longer, along each axis.
            lengths = [max(0, draw(st.integers(0, 3)) * length // 2 + draw(st.integers(-1, 1))) for length in shape]
            return builder.add(op.name, one, shape=tuple(lengths), starts=draw(numbers), steps=draw(numbers))
        case "matmul":
            return builder.matmul(*operands)
    order = tuple(draw(st.permutations(range(rank))))
    axes = order if op.name == "transpose" else order[:1]
    if op.kind == "reduction":
        axes = tuple(sorted(order[: draw(st.integers(0, rank))]))
    return builder.add(op.name, *operands, axes=axes)


@settings(max_examples=200, deadline=None)
@given(wild_graphs())
def test_wild_graphs(graph: Graph) -> None:
    encoded = encode_graph(graph)
    assert accepted(encoded) in (graph, None)
    assert graph_digest(graph) == graph_digest(decode_graph(encoded))


@settings(max_examples=200, deadline=None)
@given(st.one_of(graphs(), wild_graphs()), st.data())
def test_declared_kernels(graph: Graph, data: st.DataObject) -> None:
    encoded = encode_kernel(declare(graph))
    assert decode_kernel(encoded) == declare(graph)
    other = changed(data.draw, encoded)
    try:
        kernel = decode_kernel(other)
    except ProtocolError:
        return
    found, said = measure(kernel.graph), kernel.demand
    assert found.flops <= said.flops
    assert found.moved_bytes <= said.moved_bytes
    assert found.memory_bytes <= said.memory_bytes
