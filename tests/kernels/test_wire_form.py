"""Kernels as bytes: golden files, what is exact, what is refused, and what is declared."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import KernelError, ProtocolError, VersionError
from sparkle_mesh.kernels.accounting import Demand, measure
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, Node
from sparkle_mesh.kernels.ops import DTYPES, OPS, Scalar, TensorType
from sparkle_mesh.kernels.wire_form import (
    DeclaredKernel,
    KernelBounds,
    declare,
    decode_graph,
    decode_kernel,
    encode_graph,
    encode_kernel,
    graph_digest,
)
from sparkle_mesh.kernels.wire_messages import DTYPE_CODES, ELEMENTWISE_CODES, REDUCTION_CODES, EncodedGraph
from tests.kernels.adversarial import GRAPHS
from tests.kernels.graphs import graphs

GOLDEN = Path(__file__).parent / "golden"
NUMBERS: list[tuple[Scalar, str]] = [
    (True, "bool"),
    (False, "bool"),
    (2**64 - 1, "uint64"),
    (-(2**63), "int64"),
    (2**63 - 1, "int64"),
    (-128, "int8"),
    (0.0, "float32"),
    (-0.0, "float32"),
    (math.inf, "float16"),
    (-math.inf, "float64"),
    (math.nan, "float64"),
    (5e-324, "float64"),
    (-2.225073858507201e-308, "float64"),
    (1.7976931348623157e308, "float64"),
    (1 / 3, "float64"),
    (3, "float32"),
    (3.0, "float32"),
    (2**63, "float64"),
    (-(2**63), "float16"),
]


def every_form() -> Graph:
    """Return a graph with a node of every form, and every kind of number."""
    builder = GraphBuilder([TensorType((2, 3), "float32"), TensorType((3, 300), "float32"), TensorType((), "uint64")])
    product = builder.matmul(0, 1)
    total = builder.reduce("sum", product, [1])
    part = builder.add("slice", product, shape=(2, 4), starts=(1, 280), steps=(-1, 5))
    placed = builder.add("place", part, shape=(2, 300), starts=(0, 0), steps=(1, 70))
    joined = builder.add("concatenate", product, placed, product, axes=(0,))
    turned = builder.reshape(builder.transpose(joined), (6, 300))
    counted = builder.add("iota", shape=(6, 300), dtype="int16", axes=(1,))
    added = builder.elementwise("add", turned, builder.cast(counted, "float32"))
    chosen = builder.elementwise("where", builder.elementwise("less", added, turned), added, turned)
    numbers = [builder.add("constant", dtype=dtype, value=value) for value, dtype in NUMBERS]
    shifted = builder.elementwise("bitwise_xor", 2, numbers[2])
    spread = builder.broadcast(total, (4, 2))
    return builder.finish([chosen, spread, shifted, *numbers])


def every_code() -> Graph:
    """Return a graph with every elementwise operation, every reduction and every dtype."""
    inputs = [TensorType((4,), dtype) for dtype in DTYPE_CODES]
    builder = GraphBuilder(inputs)
    results = []
    for op in ELEMENTWISE_CODES:
        for dtype in ("float32", "int32", "bool"):
            operand = DTYPE_CODES.index(dtype)
            try:
                value = builder.add(
                    op, *((0, operand, operand) if op == "where" else (operand,) * (OPS[op].arity or 0))
                )
            except KernelError:
                continue
            results.append(value if builder.type_of(value).dtype == "bool" else builder.cast(value, "bool"))
            break
        else:
            raise AssertionError(op)
    for op in REDUCTION_CODES:
        results.append(builder.broadcast(builder.cast(builder.add(op, 10, axes=(0,)), "bool"), (4,)))
    results += [builder.cast(0, dtype) for dtype in DTYPE_CODES[1:]]
    return builder.finish([builder.add("concatenate", *results[:-11], axes=(0,)), *results[-11:]])


EVERY: dict[str, Callable[[], Graph]] = {"every_form": every_form, "every_code": every_code}


def softmax() -> Graph:
    builder = GraphBuilder([TensorType((8, 5), "float32")])
    weight = builder.elementwise(
        "exp", builder.elementwise("subtract", 0, builder.reduce("max", 0, [1], keepdims=True))
    )
    return builder.finish([builder.elementwise("divide", weight, builder.reduce("sum", weight, [1], keepdims=True))])


@pytest.mark.parametrize("name", EVERY)
def test_golden_graphs(name: str) -> None:
    golden = (GOLDEN / f"{name}.1.msgpack").read_bytes()
    graph = EVERY[name]()
    assert encode_graph(graph) == golden
    assert decode_graph(golden) == graph
    assert graph_digest(graph) == hashlib.sha256(golden).digest()


def test_golden_kernel() -> None:
    golden = (GOLDEN / "kernel.1.msgpack").read_bytes()
    # What it declares is what was measured when the file was made; it may be measured to take less now.
    kernel = DeclaredKernel(softmax(), Demand(flops=680, moved_bytes=1088, memory_bytes=512))
    assert decode_kernel(golden) == kernel
    assert encode_kernel(kernel) == golden


def test_golden_files_have_every_code() -> None:
    ops = {node.op for name in EVERY for node in EVERY[name]().nodes}
    assert ops == set(OPS)
    assert {node.dtype for node in every_code().nodes} == set(DTYPES) == set(DTYPE_CODES)


def test_there_is_a_code_for_everything() -> None:
    elementwise = {name for name, op in OPS.items() if op.kind == "elementwise"}
    assert set(ELEMENTWISE_CODES) == elementwise - {"cast"}
    assert set(REDUCTION_CODES) == {name for name, op in OPS.items() if op.kind == "reduction"}
    for codes in (ELEMENTWISE_CODES, REDUCTION_CODES, DTYPE_CODES):
        assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(("value", "dtype"), NUMBERS, ids=str)
def test_numbers_are_exact(value: Scalar, dtype: str) -> None:
    graph = Graph((Node("constant", dtype=dtype, value=value),), (0,))
    (node,) = decode_graph(encode_graph(graph)).nodes
    assert node.value is not None
    assert type(node.value) is type(value)
    assert node.value == value or (value != value and node.value != node.value)
    assert math.copysign(1, float(node.value)) == math.copysign(1, value) or value != value
    assert Graph((node,), (0,)) == graph


def test_no_two_numbers_are_one() -> None:
    digests = {graph_digest(Graph((Node("constant", dtype=dtype, value=value),), (0,))) for value, dtype in NUMBERS}
    assert len(digests) == len(NUMBERS)


def test_there_is_one_nan() -> None:
    """Graphs are equal whatever NaN they hold, so their bytes are."""
    other = struct.unpack(">d", bytes.fromhex("fff800000000beef"))[0]
    one, two = (Graph((Node("constant", dtype="float64", value=value),), (0,)) for value in (math.nan, other))
    assert one == two
    assert encode_graph(one) == encode_graph(two)
    canonical = struct.pack(">d", math.nan)
    assert canonical in encode_graph(one)
    with pytest.raises(ProtocolError, match="encoded in another way"):
        decode_graph(encode_graph(one).replace(canonical, bytes.fromhex("7ff8000000000001")))


@settings(max_examples=200)
@given(graphs())
def test_graphs_come_back_as_they_were(graph: Graph) -> None:
    encoded = encode_graph(graph)
    decoded = decode_graph(encoded)
    assert decoded == graph
    assert encode_graph(decoded) == encoded
    assert graph_digest(graph) == hashlib.sha256(encoded).digest()
    assert fuse(decoded) == fuse(graph)
    kernel = declare(graph)
    assert decode_kernel(encode_kernel(kernel)) == kernel


def test_integers_of_numpy_are_integers() -> None:
    number, flag = np.int64(3), np.bool_(True)
    nodes = (
        Node("input", shape=(number, 2)),  # type: ignore[arg-type]
        Node("transpose", (np.int64(0),), (2, number), axes=(np.int8(1), np.int8(0))),  # type: ignore[arg-type]
    )
    plain = Graph((Node("input", shape=(3, 2)), Node("transpose", (0,), (2, 3), axes=(1, 0))), (1,))
    assert encode_graph(Graph(nodes, (flag,))) == encode_graph(plain)  # type: ignore[arg-type]


def test_a_kernel_is_small() -> None:
    assert len(encode_graph(softmax())) < 80


X = Node("input", shape=(3,))
UNFIT: dict[str, tuple[Graph, str]] = {
    "a node that nobody needs": (
        Graph((X, Node("exp", (0,), (3,)), Node("sin", (0,), (3,))), (1,)),
        "needed by no",
    ),
    "axes of an addition": (Graph((X, Node("add", (0, 0), (3,), axes=(0,))), (1,)), "says more than"),
    "starts of a transpose": (
        Graph((X, Node("transpose", (0,), (3,), axes=(0,), starts=(1,))), (1,)),
        "says more than",
    ),
    "a value of an input": (Graph((Node("input", value=1.0),), (0,)), "says more than"),
    "a wrong type": (Graph((X, Node("exp", (0,), (4,))), (1,)), "would be"),
    "no nodes": (Graph((), ()), "1 to 4096 nodes"),
    "steps beyond all": (
        Graph((X, Node("slice", (0,), (1,), starts=(0,), steps=(2**41,))), (1,)),
        "not a valid EncodedGraph",
    ),
    "another kind of float": (Graph((Node("constant", value=np.float64(1.0)),), (0,)), "says more than"),
}


@pytest.mark.parametrize(("graph", "says"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_sent_is_said(graph: Graph, says: str) -> None:
    with pytest.raises(KernelError, match=says):
        encode_graph(graph)


def raw(*nodes: Any, outputs: Any = None, version: Any = 1) -> bytes:
    """Return what somebody might send."""
    return msgspec.msgpack.encode([version, nodes, [len(nodes) - 1] if outputs is None else list(outputs)])


IN = [0, 10, [3]]
MATRIX = [0, 10, [3, 4]]
FORGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a valid"),
    "no nodes": (raw(), "not a valid EncodedGraph"),
    "no outputs": (raw(IN, outputs=[]), "not a valid EncodedGraph"),
    "an output that is none": (raw(IN, outputs=[1]), "not all nodes"),
    "too many outputs": (raw(IN, outputs=[0] * 65), "not a valid EncodedGraph"),
    "a form that is none": (raw([13, 0]), "not a valid EncodedGraph"),
    "an operation that is none": (raw(IN, [3, len(ELEMENTWISE_CODES), [0]]), "not a valid EncodedGraph"),
    "a dtype that is none": (raw([0, 12, [3]]), "not a valid EncodedGraph"),
    "an operand of itself": (raw(IN, [3, 1, [1]]), "not all before it"),
    "an operand ahead": (raw(IN, [3, 1, [2]], [3, 1, [1]]), "not all before it"),
    "a negative operand": (raw(IN, [3, 1, [-1]]), "not a valid EncodedGraph"),
    "an operand too many": (raw(IN, [3, 1, [0, 0]]), "takes 1 operands"),
    "a concatenation of nothing": (raw([12, 0, []]), "one operand at least"),
    "a concatenation of what has other ranks": (raw(MATRIX, IN, [12, 1, [0, 1]]), "the rest differs"),
    "an input behind others": (raw([1, 10, 1.0], IN, [3, 1, [1]], outputs=[0, 2]), "follows what is none"),
    "a bool for a length": (raw([0, 10, [True]]), "not a valid EncodedGraph"),
    "a float for a length": (raw([0, 10, [3.0]]), "not a valid EncodedGraph"),
    "a negative length": (raw([0, 10, [-1]]), "not a valid EncodedGraph"),
    "a length too long": (raw([0, 10, [2**40 + 1]]), "not a valid EncodedGraph"),
    "lengths too long together": (raw([0, 10, [2**21, 2**20]]), "elements"),
    "lengths that a zero hides": (raw([0, 10, [0, 2**21, 2**20]]), "elements"),
    "too many dimensions": (raw([0, 10, [1] * 9]), "not a valid EncodedGraph"),
    "text for a number": (raw([1, 10, "1"]), "not a valid EncodedGraph"),
    "no number": (raw([1, 10, None]), "not a valid EncodedGraph"),
    "a number of another dtype": (raw([1, 0, 1]), "is no bool"),
    "a number out of its dtype": (raw([1, 5, 256]), "is no uint8"),
    "a node with a field too many": (raw([0, 10, [3], 1]), "encoded in another way"),
    "a message with a field too many": (msgspec.msgpack.encode([1, [IN], [0], 0]), "encoded in another way"),
    "a node that nobody needs": (raw(IN, [3, 1, [0]], outputs=[0]), "needed by no output"),
    "a slice out of its operand": (raw(IN, [10, 0, [2], [2], [1]]), "not within 3"),
    "a slice that goes nowhere": (raw(IN, [10, 0, [2], [2], [0]]), "not within 3"),
    "axes twice": (raw(MATRIX, [5, 0, 0, [0, 0]]), "different ones"),
    "a reduction without axes there": (raw(IN, [5, 0, 0, [1]]), "different ones"),
    "a map": (msgspec.msgpack.encode({"version": 1}), "not a valid"),
    "a long integer": (raw(IN).replace(b"\x0a", b"\xd1\x00\x0a"), "encoded in another way"),
    "deep nesting": (b"\x93\x01\x91" + b"\x91" * 100_000 + b"\x01", "not a valid"),
    "an array that promises more than there is": (b"\xdd\xff\xff\xff\xff", "not a valid"),
    "nodes that are promised": (b"\x93\x01\xdd\x00\x00\x10\x00", "not a valid"),
    "more nodes than there can be": (raw(*[[1, 10, 1.0]] * 4097), "not a valid"),
    "something behind it": (raw(IN) + b"\x00", "not a valid"),
    "too much": (bytes(limits.KERNEL_ENCODED_MAX_BYTES + 1), "over the limit"),
}


@pytest.mark.parametrize(("data", "says"), FORGED.values(), ids=FORGED)
def test_what_is_forged_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says) as raised:
        decode_graph(data)
    assert not isinstance(raised.value, VersionError)
    assert len(str(raised.value)) < 2 * limits.REASON_MAX_CHARS


def test_other_versions_are_refused_with_their_number() -> None:
    with pytest.raises(VersionError, match="version 2; only 1"):
        decode_graph(msgspec.msgpack.encode([2, "whatever", {"comes": ["then"]}]))
    with pytest.raises(VersionError, match="version 3; only 1"):
        decode_kernel(msgspec.msgpack.encode({"version": 3, "news": 1}))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_at_the_bounds_are_taken(name: str) -> None:
    graph = GRAPHS[name]()
    assert decode_graph(encode_graph(graph)) == graph


def joined(operand_count: int) -> bytes:
    """Return an encoded graph with so many operands in all."""
    nodes: list[Any] = [[0, 10, [0]]]
    while operand_count > 0:
        count = min(operand_count, 250)
        nodes.append([12, 0, [len(nodes) - 1] * count])
        operand_count -= count
    return raw(*nodes)


def test_operands_in_all_are_bounded() -> None:
    limit = limits.KERNEL_OPERANDS_IN_ALL_MAX_COUNT
    assert len(decode_graph(joined(limit)).nodes) > 100
    with pytest.raises(ProtocolError, match=f"{limit + 1} operands, over the limit of {limit}"):
        decode_graph(joined(limit + 1))


BOUNDS: dict[str, tuple[KernelBounds, str]] = {
    "max_encoded_bytes": (KernelBounds(max_encoded_bytes=20), "over the limit of 20"),
    "max_nodes": (KernelBounds(max_nodes=3), "nodes is over the limit of 3"),
    "max_operands": (KernelBounds(max_operands=4), "operands, over the limit of 4"),
    "max_rank": (KernelBounds(max_rank=1), "2 dimensions, over the limit of 1"),
    "max_elements": (KernelBounds(max_elements=39), "40 elements, over the limit of 39"),
    "max_flops": (KernelBounds(max_flops=679), "680 operations is over the limit of 679"),
    "max_bytes": (KernelBounds(max_bytes=1087), "1088 bytes moved is over the limit of 1087"),
    "max_memory_bytes": (KernelBounds(max_memory_bytes=511), "512 bytes of memory is over the limit of 511"),
}


@pytest.mark.parametrize(("bounds", "says"), BOUNDS.values(), ids=BOUNDS)
def test_bounds_of_the_receiver_hold(bounds: KernelBounds, says: str) -> None:
    kernel = declare(softmax())
    assert kernel.demand == Demand(680, 1088, 512)
    with pytest.raises(ProtocolError, match=says):
        decode_graph(encode_graph(softmax()), bounds=bounds)
    with pytest.raises(ProtocolError, match="over the limit"):
        decode_kernel(encode_kernel(kernel), bounds=bounds)


def test_what_fits_its_bounds_exactly_is_taken() -> None:
    bounds = KernelBounds(max_flops=680, max_bytes=1088, max_memory_bytes=512, max_elements=40, max_rank=2)
    assert decode_kernel(encode_kernel(declare(softmax())), bounds=bounds).graph == softmax()


def forged(**changes: Any) -> bytes:
    fields = msgspec.msgpack.decode(encode_kernel(declare(softmax())))
    return msgspec.msgpack.encode({**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"flops": 679}, "takes 680 operations, and declares 679"),
        ({"moved_bytes": 0}, "takes 1088 bytes moved, and declares 0"),
        ({"memory_bytes": 511}, "takes 512 bytes of memory, and declares 511"),
        ({"flops": -1}, "not a valid EncodedKernel"),
        ({"flops": 2**63}, "not a valid EncodedKernel"),
        ({"flops": 1.0}, "not a valid EncodedKernel"),
        ({"flops": 2**63 - 1}, "over the limit"),
        ({"memory_bytes": 2**62}, "over the limit"),
        ({"graph": b""}, "not a valid"),
        ({"graph": None}, "not a valid"),
        ({"graph": raw([0, 10, [2**38]], [3, 17, [0]])}, "and declares"),
    ],
)
def test_who_declares_wrongly_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode_kernel(forged(**changes))


def test_more_may_be_declared_and_unknown_fields_are_passed_over() -> None:
    assert decode_kernel(forged(flops=681, added="later")).demand == Demand(681, 1088, 512)


def test_less_than_is_measured_cannot_be_sent() -> None:
    kernel = declare(softmax())
    with pytest.raises(KernelError, match="and declares 1"):
        encode_kernel(replace(kernel, demand=Demand(1, 2000, 2000)))
    with pytest.raises(KernelError, match="over the limit"):
        encode_kernel(replace(kernel, demand=Demand(2**63, 2000, 2000)))


HUGE = 1 << 40
SUMS = [[5, 0, 1, [0]]] * 60
TANGENTS = [[3, 27, [0]]] * 60
SUMS_OF_EACH = [[5, 0, number, [0]] for number in range(1, 61)]
AMPLIFIED: dict[str, tuple[bytes, str]] = {
    "a number repeated and reduced": (raw([0, 10, []], [8, 0, [HUGE]], *SUMS, outputs=range(2, 62)), "operations"),
    "counting": (raw([2, 10, [2**36], 0], *TANGENTS, *SUMS_OF_EACH, outputs=range(61, 121)), "operations"),
    "zeros around nothing": (raw([0, 10, [0]], [11, 0, [HUGE], [0], [1]]), "memory|moved"),
    "sums over nothing": (raw([0, 10, [0, HUGE]], [5, 0, 0, [0]]), "memory|moved"),
    "products over nothing": (raw([0, 10, [2**20, 0]], [0, 10, [0, 2**20]], [6, 0, 1]), "memory|moved"),
    "doubling": (raw([0, 10, [1]], *[[12, 0, [n, n]] for n in range(40)]), "memory|moved"),
    "a copy of a number repeated": (raw([0, 10, []], [8, 0, [HUGE]]), "memory|moved"),
    "a large product": (raw([0, 10, [2**17, 2**17]], [6, 0, 0]), "operations"),
    "inputs": (raw([0, 11, [2**33]], [5, 0, 0, [0]]), "memory"),
}


@pytest.mark.parametrize(("data", "says"), AMPLIFIED.values(), ids=AMPLIFIED)
def test_little_bytes_do_not_make_much_work(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=f"takes [0-9]+ .*({says}).* over the limit"):
        decode_graph(data)


def test_golden_files_are_read_by_the_schema_alone() -> None:
    message = wire.decode((GOLDEN / "every_form.1.msgpack").read_bytes(), EncodedGraph)
    assert message.version == 1
    assert len({type(form) for form in message.nodes}) == 13


def test_measuring_is_what_was_declared() -> None:
    assert declare(every_form()).demand == measure(every_form())
