"""How mirrors run programs: each step as NumPy would do it, in the device's own memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import as_strided

from sparkle_mesh.backends import (
    Body,
    Buffer,
    Data,
    ElementwiseStep,
    Instruction,
    MatmulStep,
    Program,
    ReduceStep,
    Step,
    Stop,
    View,
    WriteStep,
)
from sparkle_mesh.errors import KernelStoppedError

if TYPE_CHECKING:
    from sparkle_mirror import MirrorDevice

REDUCTIONS = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


class MirrorProgram:
    """A program made ready for one device; Sparkle runs it any number of times, from any thread."""

    def __init__(self, device: MirrorDevice, program: Program) -> None:
        self._device = device
        self._program = program

    def run(self, inputs: Sequence[Data], outputs: Sequence[Data], should_stop: Stop) -> None:
        """Fill ``outputs``: buffers on this device, as ``inputs`` are. Work could also be queued, and done later."""
        program = self._program
        # All blocks as dense arrays: those that are handed over, and what is only needed in between.
        given = dict(zip((*range(len(inputs)), *program.outputs), (*inputs, *outputs), strict=True))
        blocks: dict[int, np.ndarray] = {number: self._array(buffer) for number, buffer in given.items()}
        for step, frees in zip(program.steps, program.frees, strict=True):
            if should_stop():
                raise KernelStoppedError("this kernel was stopped before its end")
            for number in results_of(step):
                if number not in blocks:
                    blocks[number] = np.empty(program.blocks[number].size, program.blocks[number].dtype)
            # Infinities and NaNs tell, as on other devices; there are no warnings.
            with np.errstate(all="ignore"):
                run_step(step, blocks)
            for number in frees:
                blocks.pop(number, None)

    def _array(self, buffer: Data) -> np.ndarray:
        # NumPy's arrays are handed to the CPU alone.
        assert isinstance(buffer, Buffer)
        # What lies in a block begins at its start; the block may be larger.
        return self._device.driver.block(buffer.memory.native)[: buffer.nbytes].view(buffer.dtype)


def results_of(step: Step) -> list[int]:
    """Return the blocks that a step writes."""
    return [block for _, block in step.results] if isinstance(step, ElementwiseStep) else [step.result]


def run_step(step: Step, blocks: dict[int, np.ndarray]) -> None:
    """Do one step of a program."""
    match step:
        case ElementwiseStep():
            values = compute(step.body, blocks)
            for slot, block in step.results:
                blocks[block].reshape(step.body.shape)[...] = values[slot]
        case ReduceStep():
            value = np.broadcast_to(compute(step.body, blocks)[step.slot], step.body.shape)
            blocks[step.result][:] = REDUCTIONS[step.op].reduce(value, axis=step.axes, dtype=step.dtype).reshape(-1)
        case MatmulStep():
            a = matrices(blocks[step.a], step.batch, step.rows, step.inner, transposed=step.transpose_a)
            b = matrices(blocks[step.b], step.batch, step.inner, step.columns, transposed=step.transpose_b)
            blocks[step.result][:] = np.matmul(a, b).reshape(-1)
        case WriteStep():
            if step.fill:
                blocks[step.result][:] = 0
            for source, target in step.parts:
                view(blocks, target)[...] = view(blocks, source)


def compute(body: Body, blocks: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Return the slots of elementwise work: what is read, then what each instruction makes of slots before it."""
    slots = [view(blocks, read) for read in body.reads]
    for instruction in body.instructions:
        slots.append(instruct(instruction, [slots[number] for number in instruction.operands], body))
    return slots


def instruct(instruction: Instruction, operands: list[np.ndarray], body: Body) -> np.ndarray:
    """Return what one instruction makes of its operands."""
    match instruction.op:
        case "constant":
            return np.asarray(instruction.value, instruction.dtype)
        case "iota":
            lengths = [1] * len(body.shape)
            lengths[instruction.axis] = -1
            return np.arange(body.shape[instruction.axis]).astype(instruction.dtype).reshape(lengths)
        case "cast":
            return operands[0].astype(instruction.dtype)
        case "copy":
            return operands[0]
        case name:  # all others are NumPy's functions of that name
            return np.asarray(getattr(np, name)(*operands))


def view(blocks: dict[int, np.ndarray], where: View) -> np.ndarray:
    """Return elements of a block as an array: strides are in elements, and may be 0 or negative."""
    block = blocks[where.block]
    if 0 in where.shape:
        return np.empty(where.shape, block.dtype)
    return as_strided(block[where.offset :], where.shape, [stride * block.itemsize for stride in where.strides])


def matrices(block: np.ndarray, batch: tuple[int, ...], rows: int, columns: int, *, transposed: bool) -> np.ndarray:
    """Return a block as matrices; those that lie transposed have their columns first."""
    return block.reshape(*batch, columns, rows).swapaxes(-1, -2) if transposed else block.reshape(*batch, rows, columns)
