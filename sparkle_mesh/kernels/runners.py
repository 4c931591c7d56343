"""One way to run programs for each kind of device, behind one interface."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.devices.buffers import Buffer
from sparkle_mesh.devices.device import Device, Memory
from sparkle_mesh.kernels.cpu_executor import CpuExecutor
from sparkle_mesh.kernels.cpu_executor import PreparedProgram as CpuProgram
from sparkle_mesh.kernels.fusion import fused
from sparkle_mesh.kernels.generated_executor import GeneratedExecutor
from sparkle_mesh.kernels.generated_executor import PreparedProgram as GeneratedProgram
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.program import Program

Stop: TypeAlias = Callable[[], bool]
Data: TypeAlias = Buffer | npt.NDArray[Any]


class Prepared(Protocol):
    """A program made ready for one device."""

    def run(self, inputs: Sequence[Data], outputs: Sequence[Data], should_stop: Stop) -> None:
        """Run it; the work may be queued only when this returns."""


@runtime_checkable
class RunsPrograms(Protocol):
    """What a device of another package offers that runs programs its own way."""

    def prepare_program(self, program: Program) -> Prepared:
        """Return ``program`` made ready."""


class _OnCpu:
    def __init__(self, prepared: CpuProgram, program: Program) -> None:
        self._prepared, self._program = prepared, program

    def run(self, inputs: Sequence[Data], outputs: Sequence[Data], should_stop: Stop) -> None:
        blocks: list[npt.NDArray[Any] | None] = [None] * len(self._program.blocks)
        for block, data in zip((*range(len(inputs)), *self._program.outputs), (*inputs, *outputs), strict=True):
            blocks[block] = data.view() if isinstance(data, Buffer) else data.reshape(-1)
        self._prepared.run(blocks, should_stop=should_stop)


class _Generated:
    def __init__(self, prepared: GeneratedProgram, program: Program) -> None:
        self._prepared, self._program = prepared, program

    def run(self, inputs: Sequence[Data], outputs: Sequence[Data], should_stop: Stop) -> None:
        blocks: list[Memory | None] = [None] * len(self._program.blocks)
        for block, data in zip((*range(len(inputs)), *self._program.outputs), (*inputs, *outputs), strict=True):
            assert isinstance(data, Buffer)
            blocks[block] = data.memory
        self._prepared.run(blocks, should_stop=should_stop)


class _OnHost:
    """Runs on the CPU for a device that only has memory."""

    def __init__(self, on_cpu: _OnCpu) -> None:
        self._on_cpu = on_cpu

    def run(self, inputs: Sequence[Data], outputs: Sequence[Data], should_stop: Stop) -> None:
        taken = [np.asarray(data).reshape(-1) for data in inputs]
        results = [np.empty(data.size, data.dtype) for data in outputs]
        self._on_cpu.run(taken, results, should_stop)
        for data, result in zip(outputs, results, strict=True):
            assert isinstance(data, Buffer)
            data.copy_from(result)


class _Nothing:
    """Runs nothing: sizes were all that mattered."""

    def run(self, inputs: Sequence[Data], outputs: Sequence[Data], should_stop: Stop) -> None: ...


class Runner:
    """Programs on one device, each prepared once; for any thread.

    Parameters
    ----------
    device
        Where they run.
    cpu
        Runs what devices of other packages cannot.
    """

    def __init__(self, device: Device, cpu: CpuExecutor) -> None:
        self.device = device
        self._cpu = cpu
        self._generated = GeneratedExecutor(device) if device.capabilities.language else None
        self._lock = threading.Lock()
        self._prepared: OrderedDict[Graph, tuple[Program, Prepared]] = OrderedDict()

    def prepare(self, graph: Graph) -> tuple[Program, Prepared]:
        """Return the program of ``graph``, ready to run."""
        with self._lock:
            found = self._prepared.get(graph)
            if found is not None:
                self._prepared.move_to_end(graph)
                return found
        program = fused(graph)
        prepared = self._make(program)
        with self._lock:
            self._prepared[graph] = program, prepared
            if len(self._prepared) > limits.PREPARED_PROGRAMS_MAX_COUNT:
                self._prepared.popitem(last=False)
        return program, prepared

    def is_prepared(self, graph: Graph) -> bool:
        """Whether ``graph`` is ready to run: what it takes is not yet that of making it ready, as compiling."""
        with self._lock:
            return graph in self._prepared

    def _make(self, program: Program) -> Prepared:
        if isinstance(self.device, RunsPrograms):
            return self.device.prepare_program(program)
        if self._generated is not None:
            return _Generated(self._generated.prepare(program), program)
        if self.device.capabilities.keeps_nothing:
            return _Nothing()
        on_cpu = _OnCpu(self._cpu.prepare(program), program)
        return on_cpu if self.takes_arrays else _OnHost(on_cpu)

    @property
    def takes_arrays(self) -> bool:
        """Whether it computes in the host's memory: NumPy arrays are as good as buffers."""
        return self.device.capabilities.memory_is_host and self.device.capabilities.host_cores > 0

    def run(self, graph: Graph, inputs: Sequence[Data], outputs: Sequence[Data], should_stop: Stop) -> None:
        """Compute the outputs of ``graph``; the work may be queued only when this returns.

        Parameters
        ----------
        inputs, outputs
            Buffers on the device, of the graph's types; or C-contiguous NumPy arrays where it ``takes_arrays``.
        """
        self.prepare(graph)[1].run(inputs, outputs, should_stop)

    def allocate(self, graph: Graph) -> list[Buffer]:
        """Return buffers for the outputs of ``graph``."""
        return [Buffer(tensor.size, tensor.dtype, self.device) for tensor in graph.output_types]
