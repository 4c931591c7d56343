"""Runs graphs by generated kernels; and the devices to run them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sparkle_mesh.devices.device import Device, Memory
from sparkle_mesh.devices.registry import Registry
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.generated_executor import GeneratedExecutor
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.program import Body, ElementwiseStep, Instruction, Program, View

Array = np.ndarray[Any, Any]
KINDS = ("opencl", "cuda", "rocm")
REASONS = {
    "opencl": 'needs an OpenCL device; pip install "pyopencl[pocl]" brings one for any processor',
    "cuda": "needs an NVIDIA GPU and CuPy",
    "rocm": "needs an AMD GPU and CuPy",
}


def first_device(registry: Registry, kind: str) -> Device | None:
    """Return the first device of one kind."""
    return next(iter(registry.devices(kind)), None)


def executor(device: Device) -> GeneratedExecutor:
    """Return one whose OpenCL kernels are compiled in a hurry: that takes most of the tests' time."""
    return GeneratedExecutor(device, options=["-cl-opt-disable"] if device.kind == "opencl" else [])


def merged(program: Program) -> Program:
    """Return a program whose elementwise steps, all of one shape, are one step."""
    steps = [step for step in program.steps if isinstance(step, ElementwiseStep)]
    assert len(steps) == len(program.steps)
    assert len({step.body.shape for step in steps}) == 1
    reads: dict[View, str] = {}
    for step in steps:
        reads.update(zip(step.body.reads, step.body.read_dtypes, strict=True))
    places = {view: place for place, view in enumerate(reads)}
    instructions: list[Instruction] = []
    results: list[tuple[int, int]] = []
    for step in steps:
        slots = [places[view] for view in step.body.reads]
        for one in step.body.instructions:
            operands = tuple(slots[operand] for operand in one.operands)
            slots.append(len(reads) + len(instructions))
            instructions.append(replace(one, operands=operands))
        results += [(slots[slot], block) for slot, block in step.results]
    body = Body(steps[0].body.shape, tuple(reads), tuple(reads.values()), tuple(instructions))
    return replace(program, steps=(ElementwiseStep(body, tuple(results)),), frees=((),))


def run_on(device: Device, graph: Graph, inputs: Sequence[Array], *, merge: bool = False) -> list[Array]:
    """Return the outputs of ``graph``; all memory is given back."""
    program = merged(fuse(graph)) if merge else fuse(graph)
    prepared = executor(device).prepare(program)
    blocks: list[Memory | None] = [None] * len(program.blocks)
    for number, array in enumerate(inputs):
        memory = blocks[number] = device.pool.allocate(array.nbytes)
        device.copy_from_host(memory, np.ascontiguousarray(array))
    before = device.pool.in_use_bytes
    outputs = prepared.run(blocks)
    found = []
    for memory, tensor in zip(outputs, graph.output_types, strict=True):
        array = np.empty(tensor.shape, tensor.dtype)
        device.copy_to_host(memory, array)
        device.pool.free(memory)
        found.append(array)
    assert device.pool.in_use_bytes == before
    for memory in blocks[: len(inputs)]:
        assert memory is not None
        device.pool.free(memory)
    return found
