"""The text of generated kernels: what a device without a compiler for it can show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from sparkle_mesh import limits
from sparkle_mesh.devices.compiled import CompiledKernel
from sparkle_mesh.devices.device import Memory
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels import codegen, codegen_access, codegen_elementwise, codegen_reduce
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.generated_executor import GeneratedExecutor
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import DTYPES, TensorType
from sparkle_mesh.kernels.program import Body, ElementwiseStep, Instruction, ReduceStep, dense_view
from tests.kernels import nvrtc
from tests.kernels.generated import merged
from tests.kernels.graphs import graphs
from tests.kernels.test_generated_executor import PORTIONS


class ListedKernel(CompiledKernel):
    def _launch(self, global_size: tuple[int, ...], local_size: tuple[int, ...] | None, arguments: list[Any]) -> None:
        self.device.launched.append((self.name, global_size, local_size))  # type: ignore[attr-defined]


class ListingDevice(NullDevice):
    """Takes any source, and lists what is asked of it."""

    def __init__(self, language: str = "cuda", **capabilities: Any) -> None:
        super().__init__()
        self.capabilities = dataclasses.replace(
            self.capabilities, language=language, local_size_max=1024, **capabilities
        )
        self.sources: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.launched: list[Any] = []
        self.products: list[Any] = []

    def _compile(self, source: str, name: str, options: tuple[str, ...]) -> CompiledKernel:
        self.sources[name] = (source, options)
        return ListedKernel(self, name)

    def bound_matmul(self, *arguments: Any, **options: Any) -> Callable[..., None]:
        return lambda a, b, out: self.products.append((arguments, options))


def sources_of(graph: Graph, language: str = "cuda") -> list[str]:
    device = ListingDevice(language)
    GeneratedExecutor(device).prepare(fuse(graph))
    return [source for source, _ in device.sources.values()]


def scaled(*shape: int, dtype: str = "float32") -> Graph:
    builder = GraphBuilder([TensorType(shape, dtype)])
    return builder.finish([builder.elementwise("multiply", 0, WeakScalar(2))])


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_the_same_graph_has_the_same_text(graph: Graph) -> None:
    for language in ("cuda", "opencl"):
        assert sources_of(graph, language) == sources_of(graph, language)


def test_one_text_serves_all_sizes_of_dense_work() -> None:
    assert sources_of(scaled(5)) == sources_of(scaled(1_000_000)) == sources_of(scaled(300, 200))

    # Also of rows, whose length stands in the text, and of sums over all.
    def rows(count: int) -> list[str]:
        builder = GraphBuilder([TensorType((count, 8), "float32"), TensorType((8,), "float32")])
        return sources_of(builder.finish([builder.elementwise("add", 0, 1)]))

    def total(count: int) -> list[str]:
        builder = GraphBuilder([TensorType((count,), "float32")])
        return sources_of(builder.finish([builder.reduce("sum", 0)]))

    assert rows(10) == rows(1000)
    assert total(1 << 26) == total(1 << 27)


def test_names_tell_texts_apart() -> None:
    names = {
        source.split("sparkle_elementwise_")[1][:16]
        for dtype in DTYPES[1:]
        for source in sources_of(scaled(9, dtype=dtype))
    }
    assert len(names) == len(DTYPES) - 1


def test_places_beyond_32_bits_are_counted_in_64() -> None:
    for count, wide in ((1 << 30, False), (1 << 31, True)):
        body = Body((count,), (dense_view(0, (count,)),), ("uint8",), ())
        one = codegen_elementwise.elementwise("cuda", body, [0], 256)
        other = codegen_reduce.reduction("cuda", body, 0, "max", (0,), 256, "uint8")
        assert one.is_wide == other.is_wide == wide
        assert f"typedef {'i64' if wide else 'i32'} ix;" in one.source.text


def test_large_sums_are_split_by_their_shape_alone() -> None:
    def shares(*shape: int, axes: tuple[int, ...]) -> int:
        body = Body(shape, (dense_view(0, shape),), ("float32",), ())
        return codegen_reduce.reduction("cuda", body, 0, "sum", axes, 256, "float32").shares

    assert shares(1 << 26, axes=(0,)) == limits.GENERATED_REDUCE_GROUPS_COUNT
    assert shares(1000, axes=(0,)) == 1
    # There are results enough to keep a device busy.
    assert shares(1 << 20, 64, axes=(1,)) == 1
    assert 1 < shares(1 << 20, 64, axes=(0,)) <= limits.GENERATED_REDUCE_GROUPS_COUNT


def test_neutral_values_change_nothing() -> None:
    for dtype in DTYPES:
        for op, ufunc in (("sum", np.add), ("prod", np.multiply), ("max", np.maximum), ("min", np.minimum)):
            if dtype == "bool" and op in ("sum", "prod"):
                continue
            kind = np.dtype(dtype).type
            neutral = kind(codegen_reduce.neutral(op, dtype))
            for value in (kind(0), kind(1), kind(3), -kind(0) if dtype.startswith("float") else kind(0)):
                result = ufunc(neutral, value)
                assert result == value
                assert np.signbit(result.astype("float64")) == np.signbit(value.astype("float64"))


def test_no_product_is_contracted_with_a_sum() -> None:
    assert codegen.options("cuda") == ("--fmad=false",)
    # Told in the source.
    assert codegen.options("cuda", hip=True) == codegen.options("opencl") == ()
    assert "#pragma clang fp contract(off)" in sources_of(scaled(3))[0]
    assert "FP_CONTRACT OFF" in sources_of(scaled(3), "opencl")[0]


def test_doubles_are_asked_for_only_where_they_are_needed() -> None:
    assert all("fp64" not in source for source in sources_of(scaled(3), "opencl"))
    assert all("cl_khr_fp64 : enable" in source for source in sources_of(scaled(3, dtype="float64"), "opencl"))
    # These are digits of a constant.
    builder = GraphBuilder([TensorType((3,), "float32")])
    digits = builder.finish([builder.elementwise("add", 0, WeakScalar(0.890625))])
    assert any("0x3f640000u" in source for source in sources_of(digits, "opencl"))
    assert all("fp64" not in source for source in sources_of(digits, "opencl"))
    # float16 needs no extension.
    assert all("cl_khr" not in source for source in sources_of(scaled(3, dtype="float16"), "opencl"))


def test_a_device_without_doubles_says_so() -> None:
    device = ListingDevice("opencl", dtypes=frozenset(DTYPES) - {"float64"})
    executor = GeneratedExecutor(device)
    builder = GraphBuilder([TensorType((4, 4), "float64"), TensorType((4,), "int32")])
    for output in (builder.elementwise("add", 0, 0), builder.reduce("sum", 0), builder.matmul(0, 0)):
        with pytest.raises(KernelError, match=r"does not compute with float64; cast to float32"):
            executor.prepare(fuse(builder.finish([output])))
    with pytest.raises(KernelError, match="float64"):
        executor.prepare(fuse(builder.finish([builder.elementwise("divide", 1, 1)])))
    # Copies and all else go on.
    executor.prepare(fuse(builder.finish([builder.add("concatenate", 0, 0, axes=(0,))])))
    executor.prepare(fuse(builder.finish([builder.elementwise("add", 1, 1)])))


def test_an_operation_that_is_not_known_is_refused() -> None:
    body = Body((3,), (dense_view(0, (3,)),), ("int32",), (Instruction("sinc", (0,), "int32", "int32"),))
    with pytest.raises(KernelError, match="do not compute sinc of int32"):
        codegen_elementwise.elementwise("cuda", body, [1], 256)


def test_products_on_cuda_go_to_its_library() -> None:
    device = ListingDevice(matmul_dtypes=frozenset({"float32"}), matmul_transposes=True)
    builder = GraphBuilder([TensorType((2, 4, 3), "float32"), TensorType((2, 4, 5), "float32")])
    graph = builder.finish([builder.matmul(builder.transpose(0, (0, 2, 1)), 1)])
    prepared = GeneratedExecutor(device).prepare(fuse(graph))
    inputs: list[Memory | None] = [device.allocate(96), device.allocate(160), None]
    prepared.run(inputs)
    assert device.products == [(((2, 3, 4), (2, 4, 5), "float32"), {"transposed": (True, False)})]
    assert not device.sources


def test_nothing_is_launched_for_nothing() -> None:
    device = ListingDevice("opencl")
    builder = GraphBuilder([TensorType((0, 3), "float32"), TensorType((3, 0), "float32")])
    outputs = [builder.elementwise("add", 0, 0), builder.reduce("sum", 0, [1]), builder.matmul(0, 1)]
    outputs.append(builder.add("concatenate", 0, 0, axes=(0,)))
    program = fuse(builder.finish(outputs))
    blocks: list[Memory | None] = [device.allocate(0), device.allocate(0), *[None] * (len(program.blocks) - 2)]
    assert len(GeneratedExecutor(device).prepare(program).run(blocks)) == 4
    assert not device.launched


def test_bodies_of_many_operations_are_written_out_less_often() -> None:
    def unrolled(count: int) -> int:
        body = Body(
            (99,),
            (dense_view(0, (99,)),),
            ("float32",),
            tuple(Instruction("negative", (place,), "float32", "float32") for place in range(count)),
        )
        return codegen_access.unroll_count(body, 4, 2)

    assert [unrolled(count) for count in (1, 60, 120, 4000)] == [4, 2, 1, 1]


# --- NVIDIA's compiler --------------------------------------------------------------------------------

needs_nvrtc = pytest.mark.skipif(nvrtc.library() is None, reason=nvrtc.REASON)


def compile_all(device: ListingDevice) -> Sequence[str]:
    return [nvrtc.compiled(source, options) for source, options in device.sources.values()]


@needs_nvrtc
@pytest.mark.parametrize("portion", PORTIONS[::3], ids=lambda portion: f"{portion[0][0]}-{portion[-1][0]}")
def test_cuda_takes_every_operation(portion: list[tuple[str, tuple[str, ...]]]) -> None:
    device = ListingDevice()
    builder = GraphBuilder([TensorType((99,), dtype) for _, dtypes in portion for dtype in dtypes][:64])
    # Inputs of equal types are one.
    places = {builder.type_of(number).dtype: number for number in range(min(64, len(portion) * len(portion[0][1])))}
    known = [(name, dtypes) for name, dtypes in portion if set(dtypes) <= set(places)]
    graph = builder.finish([builder.add(name, *(places[dtype] for dtype in dtypes)) for name, dtypes in known])
    GeneratedExecutor(device).prepare(merged(fuse(graph)))
    assert len(compile_all(device)) == 1


@needs_nvrtc
def test_cuda_takes_programs_of_every_kind() -> None:
    device = ListingDevice(matmul_dtypes=frozenset())
    executor = GeneratedExecutor(device)
    for dtype in ("float16", "float32", "float64", "int8", "uint64"):
        builder = GraphBuilder([TensorType((64, 1000), dtype), TensorType((1000,), dtype)])
        total = builder.elementwise("add", builder.elementwise("multiply", 0, WeakScalar(2)), 1)
        outputs = [total, builder.transpose(0), builder.reduce("max", 0, [1]), builder.add("sum", total, axes=(0,))]
        outputs += [builder.add("sum", 0, axes=(0, 1)), builder.add("concatenate", 0, 0, axes=(1,))]
        if dtype.startswith("float"):
            outputs.append(builder.matmul(0, builder.transpose(0)))
        executor.prepare(fuse(builder.finish(outputs)))
    assert len(compile_all(device)) > 30


@needs_nvrtc
def test_cuda_moves_16_bytes_at_once_and_keeps_all_in_registers() -> None:
    for step in (*fuse(scaled(1 << 20)).steps, ReduceStep(*summed(1 << 20))):
        if isinstance(step, ElementwiseStep):
            kernel: Any = codegen_elementwise.elementwise("cuda", step.body, [slot for slot, _ in step.results], 256)
        else:
            assert isinstance(step, ReduceStep)
            kernel = codegen_reduce.reduction("cuda", step.body, step.slot, step.op, step.axes, 256, step.dtype)
        assembly = nvrtc.compiled(kernel.source.text, codegen.options("cuda"))
        assert assembly.count("ld.global.nc.v4") >= 4
        assert ".local" not in assembly
        assert "fma" not in assembly


def summed(count: int) -> tuple[Body, int, str, tuple[int, ...], str, int]:
    return Body((count,), (dense_view(0, (count,)),), ("float32",), ()), 0, "sum", (0,), "float32", 1
