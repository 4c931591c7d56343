"""Runs programs on devices that compile: each step as a generated kernel.

Preparing a program writes and compiles its kernels, and settles how each is launched; running it only launches them.
All is queued: whoever reads results waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.devices.device import Device, Memory
from sparkle_mesh.errors import KernelError, KernelStoppedError
from sparkle_mesh.kernels import codegen, codegen_elementwise, codegen_matmul, codegen_reduce
from sparkle_mesh.kernels.codegen import KernelSource, Language
from sparkle_mesh.kernels.codegen_access import blocks_of
from sparkle_mesh.kernels.program import (
    Body,
    ElementwiseStep,
    MatmulStep,
    Program,
    ReduceStep,
    Step,
    View,
    WriteStep,
    blocks_written,
    dense_view,
)


class _Action(Protocol):
    def run(self, memories: Sequence[Memory | None]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Launch:
    device: Device
    launch: Callable[[list[Any]], None]
    blocks: tuple[int, ...]
    numbers: tuple[Any, ...]

    def run(self, memories: Sequence[Memory | None]) -> None:
        native_of = self.device.native_of
        self.launch([*(native_of(_present(memories[block])) for block in self.blocks), *self.numbers])


@dataclass(frozen=True, slots=True)
class _Clear:
    device: Device
    block: int
    nbytes: int

    def run(self, memories: Sequence[Memory | None]) -> None:
        self.device.clear(_present(memories[self.block]), self.nbytes)


@dataclass(frozen=True, slots=True)
class _LibraryProduct:
    device: Device
    multiply: Callable[[Any, Any, Any], None]
    blocks: tuple[int, int, int]

    def run(self, memories: Sequence[Memory | None]) -> None:
        self.multiply(*(self.device.native_of(_present(memories[block])) for block in self.blocks))


@dataclass(frozen=True, slots=True)
class _Stage:
    """What one step does: the blocks that it writes, its actions, and the blocks that are needed no more."""

    writes: tuple[int, ...]
    actions: tuple[_Action, ...]
    frees: tuple[int, ...]


class GeneratedExecutor:
    """Runs programs on one device by generated kernels.

    Parameters
    ----------
    device
        Compiles: its capabilities have a language.
    options
        For its compiler, beside those that kernels need.

    Raises
    ------
    KernelError
        If it compiles nothing.
    """

    def __init__(self, device: Device, *, options: Sequence[str] = ()) -> None:
        language = device.capabilities.language
        if not language:
            raise KernelError(f"{device} compiles no kernels; use a cuda, rocm or opencl device")
        self.device = device
        self._language: Language = language
        most = max(min(device.capabilities.local_size_max, limits.GENERATED_GROUP_MAX_COUNT), 1)
        self._threads = 1 << (most.bit_length() - 1)
        self._options = (*codegen.options(language, hip=device.kind == "rocm"), *options)

    def prepare(self, program: Program) -> PreparedProgram:
        """Compile what ``program`` needs; safe to call from any thread.

        Raises
        ------
        KernelError
            If the device cannot compute with one of its dtypes, or a step has too many operands.
        CompileError
            If the device's compiler refused a kernel.
        """
        return _Preparation(self.device, self._language, self._threads, self._options, program).prepared()


class PreparedProgram:
    """A program that is ready to run on one device; made by :meth:`GeneratedExecutor.prepare`."""

    def __init__(self, device: Device, program: Program, sizes: Sequence[int], stages: Sequence[_Stage]) -> None:
        self.device = device
        self.program = program
        # In bytes, of all blocks: the program's, then those that steps need for themselves.
        self._sizes = tuple(sizes)
        self._stages = tuple(stages)

    def run(self, blocks: Sequence[Memory | None], should_stop: Callable[[], object] | None = None) -> list[Memory]:
        """Queue the program, and return the blocks of its outputs; safe to call from any thread.

        Parameters
        ----------
        blocks
            For each of the program's blocks one of the device's memory, as large or larger, or None. The inputs are
            given. Blocks that are None come from the device's pool; those that are no outputs go back there. The
            outputs are the caller's, who frees them (``device.pool.free``).
        should_stop
            Asked before each step is queued; no more are once it returns something true.

        Raises
        ------
        KernelError
            If these are not such blocks.
        KernelStoppedError
            If the run was given up. What the outputs hold is undefined.
        OutOfMemoryError
            If the device has too little memory; what was taken is given back.
        """
        memories = self._checked(blocks)
        pool = self.device.pool
        owned: dict[int, Memory] = {}
        finished = False
        try:
            for stage in self._stages:
                if should_stop is not None and should_stop():
                    raise KernelStoppedError("this kernel was stopped before its end; its outputs are not to be used")
                for block in stage.writes:
                    if memories[block] is None:
                        memories[block] = owned[block] = pool.allocate(self._sizes[block])
                for action in stage.actions:
                    action.run(memories)
                for block in stage.frees:
                    if block in owned:
                        pool.free(owned.pop(block))
            finished = True
        finally:
            if not finished:
                for memory in owned.values():
                    pool.free(memory)
        return [_present(memories[output]) for output in self.program.outputs]

    def _checked(self, blocks: Sequence[Memory | None]) -> list[Memory | None]:
        program = self.program
        if len(blocks) != len(program.blocks):
            raise KernelError(f"this program has {len(program.blocks)} blocks, and {len(blocks)} are given; give None")
        for number, memory in enumerate(blocks):
            if memory is None:
                if number < program.input_count:
                    raise KernelError(f"block {number} is an input, {program.blocks[number]}, and none is given")
            elif memory.nbytes < self._sizes[number]:
                raise KernelError(
                    f"block {number} is {program.blocks[number]} of {self._sizes[number]} bytes, and one of"
                    f" {memory.nbytes} is given"
                )
        return [*blocks, *([None] * (len(self._sizes) - len(blocks)))]


class _Preparation:
    def __init__(
        self, device: Device, language: Language, threads: int, options: tuple[str, ...], program: Program
    ) -> None:
        self._device, self._language, self._threads, self._options = device, language, threads, options
        self._program = program
        self._sizes = [tensor.nbytes for tensor in program.blocks]

    def prepared(self) -> PreparedProgram:
        stages = []
        for step, frees in zip(self._program.steps, self._program.frees, strict=True):
            self._check_dtypes(step)
            before = len(self._sizes)
            actions = self._actions(step)
            own = range(before, len(self._sizes))
            writes = (*sorted(blocks_written(step)), *own)
            stages.append(_Stage(writes, tuple(actions), (*frees, *own)))
        return PreparedProgram(self._device, self._program, self._sizes, stages)

    def _check_dtypes(self, step: Step) -> None:
        match step:
            case ElementwiseStep(body=body) | ReduceStep(body=body):
                used = {*body.read_dtypes, *(one.dtype for one in body.instructions)}
            case MatmulStep(dtype=dtype):
                used = {dtype}
            case WriteStep():
                # Copied as they are.
                return
        # float16 is computed in float32, and bools and integers every device has.
        if "float64" in used and "float64" not in self._device.capabilities.dtypes:
            raise KernelError(
                f"{self._device} ({self._device.name}) does not compute with float64; cast to float32, or use another"
                " device"
            )

    def _actions(self, step: Step) -> list[_Action]:
        match step:
            case ElementwiseStep(body, results):
                slots, blocks = [slot for slot, _ in results], [block for _, block in results]
                return self._elementwise(body, slots, blocks)
            case ReduceStep():
                return self._reduction(step)
            case MatmulStep():
                return self._matmul(step)
            case WriteStep():
                return self._write(step)

    def _elementwise(self, body: Body, slots: Sequence[int], blocks: Sequence[int]) -> list[_Action]:
        if not prod(body.shape):
            return []
        kernel = codegen_elementwise.elementwise(self._language, body, slots, self._threads)
        return [self._launched(kernel, (*blocks_of(body), *blocks))]

    def _launched(self, kernel: codegen_elementwise.ElementwiseKernel, blocks: tuple[int, ...]) -> _Launch:
        numbers = _numbers((kernel.count,), kernel.is_wide)
        return self._launch(kernel.source, (kernel.groups,), kernel.threads, blocks, numbers)

    def _launch(
        self,
        source: KernelSource,
        groups: tuple[int, ...],
        threads: int,
        blocks: tuple[int, ...],
        numbers: tuple[np.generic[Any], ...],
    ) -> _Launch:
        kernel = self._device.compile(source.text, source.name, self._options)
        local_size = (threads, *([1] * (len(groups) - 1)))
        launch = kernel.bound((groups[0] * threads, *groups[1:]), local_size)
        return _Launch(self._device, launch, blocks, numbers)

    def _reduction(self, step: ReduceStep) -> list[_Action]:
        result = self._program.blocks[step.result]
        if not result.size:
            return []
        body, slot, axes = step.body, step.slot, step.axes
        if not prod(body.shape):
            value = int(step.op == "prod")
            return self._elementwise(codegen_elementwise.filled(result.shape, value, step.dtype), [0], [step.result])
        actions: list[_Action] = []
        blocks = blocks_of(body)
        while True:
            kernel = codegen_reduce.reduction(
                self._language, body, slot, step.op, axes, self._threads, result_dtype=step.dtype
            )
            target = step.result
            if kernel.shares > 1:
                target = len(self._sizes)
                self._sizes.append(kernel.shares * result.size * codegen.itemsize(kernel.share_dtype))
            numbers = _numbers(kernel.arguments, kernel.is_wide)
            actions.append(self._launch(kernel.source, kernel.groups, kernel.threads, (*blocks, target), numbers))
            if kernel.shares == 1:
                return actions
            body, slot, axes = codegen_reduce.shares_body(kernel, result.size), 0, (0,)
            blocks = (target,)

    def _matmul(self, step: MatmulStep) -> list[_Action]:
        if not self._program.blocks[step.result].size:
            return []
        can = self._device.capabilities
        if step.dtype in can.matmul_dtypes:
            if can.matmul_transposes:
                return [self._product(step)]
            if can.host_cores:
                # Their caches do what local memory does elsewhere, and barriers are dear.
                return self._untransposed(step)
        kernel = codegen_matmul.matmul(self._language, step, self._threads)
        numbers = _numbers(kernel.arguments, kernel.is_wide)
        blocks = (step.a, step.b, step.result)
        return [self._launch(kernel.source, (kernel.groups,), kernel.threads, blocks, numbers)]

    def _untransposed(self, step: MatmulStep) -> list[_Action]:
        """Multiply by the device's own means, which take factors that lie in their order."""
        actions: list[_Action] = []
        count, size = prod(step.batch), codegen.itemsize(step.dtype)
        factors = []
        for block, is_transposed, (rows, columns) in (
            (step.a, step.transpose_a, (step.rows, step.inner)),
            (step.b, step.transpose_b, (step.inner, step.columns)),
        ):
            target = block
            if is_transposed and count * rows * columns:
                target = len(self._sizes)
                self._sizes.append(count * rows * columns * size)
                shape = (count, rows, columns)
                source = View(block, shape, 0, (rows * columns, 1, rows))
                kernel = codegen_elementwise.copy(
                    self._language, source, dense_view(target, shape), size, self._threads
                )
                actions.append(self._launched(kernel, (block, target)))
            factors.append(target)
        plain = replace(step, a=factors[0], b=factors[1], transpose_a=False, transpose_b=False)
        return [*actions, self._product(plain)]

    def _product(self, step: MatmulStep) -> _LibraryProduct:
        shape_a, shape_b = (*step.batch, step.rows, step.inner), (*step.batch, step.inner, step.columns)
        transposed = (step.transpose_a, step.transpose_b)
        multiply = self._device.bound_matmul(shape_a, shape_b, step.dtype, transposed=transposed)
        return _LibraryProduct(self._device, multiply, (step.a, step.b, step.result))

    def _write(self, step: WriteStep) -> list[_Action]:
        result = self._program.blocks[step.result]
        if not result.size:
            return []
        actions: list[_Action] = []
        if step.fill:
            actions.append(_Clear(self._device, step.result, result.nbytes))
        size = codegen.itemsize(step.dtype)
        for source, target in step.parts:
            if prod(source.shape):
                kernel = codegen_elementwise.copy(self._language, source, target, size, self._threads)
                actions.append(self._launched(kernel, (source.block, step.result)))
        return actions


def _present(memory: Memory | None) -> Memory:
    assert memory is not None
    return memory


def _numbers(values: Sequence[int], wide: bool) -> tuple[np.generic[Any], ...]:
    return tuple(np.int64(value) if wide else np.int32(value) for value in values)
