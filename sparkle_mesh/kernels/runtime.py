"""Runs kernels: gathers operands where they are needed, on one device or on several, and learns what that takes."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.devices.buffers import Buffer
from sparkle_mesh.devices.device import Device
from sparkle_mesh.errors import KernelStoppedError, UsageError
from sparkle_mesh.kernels.array import Array, Home
from sparkle_mesh.kernels.cpu_executor import CpuExecutor
from sparkle_mesh.kernels.estimate import Corrections, Speed, estimate, form
from sparkle_mesh.kernels.events import Event, Recorder
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.placement import Choice, Part, Placement, grain_of
from sparkle_mesh.kernels.runners import Data, Runner, Stop
from sparkle_mesh.kernels.sharing import Share, Sharing
from sparkle_mesh.kernels.splitting import Split, split
from sparkle_mesh.kernels.turns import Turns

_COMBINE: Mapping[str, np.ufunc] = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


@dataclass(frozen=True, slots=True)
class Order:
    """How a kernel is to be run.

    Attributes
    ----------
    name
        The kernel's, for profiles.
    device
        Where; None where it is expected to be fastest.
    priority
        Of those that wait for a device the highest is first.
    should_stop
        Asked now and then.
    sharing
        Several devices that share it, if it can be done in parts; where it cannot, the fastest of them does it.
    """

    name: str = "kernel"
    device: Device | None = None
    priority: int = 0
    should_stop: Stop = lambda: False
    sharing: tuple[Device, ...] = ()


class Runtime:
    """The devices of one context, and what runs on them.

    Parameters
    ----------
    home
        What arrays belong to.
    devices
        The CPU first.
    speed
        What a device was measured to do.
    """

    def __init__(
        self,
        home: Home,
        devices: Sequence[Device],
        speed: Callable[[Device], Speed],
        *,
        threads: int | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._home, self._clock, self._speed = home, clock, speed
        self.cpu = CpuExecutor(threads)
        self.runners = {device: Runner(device, self.cpu) for device in devices}
        self.host = devices[0]
        self._turns = {device: Turns() for device in devices}
        self.corrections = Corrections()
        # Devices that hold nothing compute nothing that anybody wants.
        self.placement = Placement([one for one in devices if one.kind != "null"], speed, self.corrections)
        self.recorder = Recorder(clock)
        self._lock = threading.Lock()
        self._splits: OrderedDict[Graph, Split | None] = OrderedDict()
        self._run_counts: Counter[tuple[str, int]] = Counter()
        #: What each device did of the last shared work.
        self.last_shares: dict[str, Share] = {}

    # --- Choosing ---------------------------------------------------------------------------------

    def choices(self, graph: Graph, operands: Sequence[Any], sharing: Sequence[Device] = ()) -> list[Choice]:
        """Return the ways to run ``graph`` with ``operands``, the best first.

        Parameters
        ----------
        sharing
            If any: the only devices that count; that they share it comes first, if that can be.
        """

        def missing(device: Device, number: int) -> bool:
            return not _is_on(operands[number], device)

        def missing_bytes(device: Device) -> int:
            return sum(one.nbytes for number, one in enumerate(graph.inputs) if missing(device, number))

        found = self.placement.choices(
            graph, self._split(graph), missing_bytes=missing_bytes, input_missing=missing, sharing=sharing
        )
        if not found:
            dtypes = ", ".join(sorted({node.dtype for node in graph.nodes}))
            known = ", ".join(map(str, sharing or self.runners))
            raise UsageError(f"no device computes with all of {dtypes} among {known}")
        return found

    def _split(self, graph: Graph) -> Split | None:
        if len(self.runners) == 1:
            return None
        with self._lock:
            if graph in self._splits:
                self._splits.move_to_end(graph)
                return self._splits[graph]
        found = split(graph)
        with self._lock:
            self._splits[graph] = found
            if len(self._splits) > limits.PREPARED_PROGRAMS_MAX_COUNT:
                self._splits.popitem(last=False)
        return found

    # --- Running ----------------------------------------------------------------------------------

    def run(self, graph: Graph, operands: Sequence[Any], order: Order) -> list[Array]:
        """Return the outputs of ``graph``.

        Parameters
        ----------
        operands
            Of the graph's types: :class:`.array.Array`, or what NumPy makes an array of.

        Raises
        ------
        OutOfMemoryError
            If a device has no room for operands and results.
        KernelStoppedError
            If it was told to stop.
        """
        if order.should_stop():
            raise KernelStoppedError(f"kernel {order.name} was cancelled before it ran")
        if order.device is not None:
            return self._run_whole(graph, operands, order, order.device)
        if len(self.runners) == 1:
            return self._run_whole(graph, operands, order, self.host)
        best = self.choices(graph, operands, order.sharing)[0]
        if best.parts:
            return self.run_shared(graph, operands, order, best)
        return self._run_whole(graph, operands, order, best.devices[0])

    def _run_whole(self, graph: Graph, operands: Sequence[Any], order: Order, device: Device) -> list[Array]:
        runner = self.runners[device]
        inputs = [self._operand(operand, device, runner) for operand in operands]
        with self._turns[device].turn(order.priority):
            outputs = runner.allocate(graph)
            with self._timed(graph, order, device):
                runner.run(graph, inputs, outputs, order.should_stop)
        return [
            Array(self._home, tensor.shape, buffer) for tensor, buffer in zip(graph.output_types, outputs, strict=True)
        ]

    def _operand(self, operand: Any, device: Device, runner: Runner) -> Data:
        if isinstance(operand, Array):
            return operand.buffer_on(device)
        array = np.ascontiguousarray(operand)
        if runner.takes_arrays:
            return array
        return Buffer(array.size, array.dtype, device).copy_from(array)

    @contextmanager
    def _timed(self, graph: Graph, order: Order, device: Device) -> Iterator[None]:
        """Time what runs within, if that is of use: the device is waited for then."""
        if not self._is_to_be_timed(graph, device):
            yield
            return
        is_first = not self.runners[device].is_prepared(graph)
        device.synchronize()
        started = self._clock.now()
        yield
        device.synchronize()
        self._took(graph, order.name, "kernel", device, started, is_first=is_first)

    def _is_to_be_timed(self, graph: Graph, device: Device) -> bool:
        if self.recorder.is_wanted:
            return True
        if len(self.runners) == 1:
            return False
        with self._lock:
            key = str(device), form(graph)
            self._run_counts[key] += 1
            count = self._run_counts[key]
            if len(self._run_counts) > limits.COST_CORRECTIONS_MAX_COUNT:
                self._run_counts.clear()
        # Of the first run some time goes into making it ready.
        return 1 < count <= limits.TIMED_RUNS_COUNT + 1 or count % limits.TIMED_RUNS_PERIOD_COUNT == 0

    def _took(self, graph: Graph, name: str, category: str, device: Device, started: float, *, is_first: bool) -> float:
        seconds = self._clock.now() - started
        program, _ = self.runners[device].prepare(graph)
        plain = estimate(program, self._speed(device))
        moved = sum(step.moved_bytes for step in plain.steps)
        expected = plain.compute_s * self.corrections.correction(str(device), form(graph), moved)
        # Of the first run some time went into making it ready: the next ones will not take that.
        if not is_first:
            self.corrections.measured(str(device), form(graph), moved, plain.compute_s, seconds)
        if self.recorder.is_wanted:
            details: dict[str, float | int | str]
            details = {"expected_us": expected * 1e6, "bytes": moved, "flops": sum(one.flops for one in plain.steps)}
            self.recorder.add(Event(name, category, str(device), started, seconds, details))
        return seconds

    def close(self) -> None:
        """End the CPU's threads."""
        self.cpu.close()

    # --- Sharing ----------------------------------------------------------------------------------

    def run_shared(self, graph: Graph, operands: Sequence[Any], order: Order, choice: Choice) -> list[Array]:
        """Return the outputs of ``graph``, computed by several devices; they are in the host's memory."""
        found = self._split(graph)
        assert found is not None
        hosted = [np.asarray(operand) for operand in operands]
        outputs = self.runners[self.host].allocate(graph)
        pairs = zip(outputs, graph.output_types, strict=True)
        results = [buffer.view().reshape(tensor.shape) for buffer, tensor in pairs]
        work = _SharedWork(found, operands, hosted, results)
        workers = [_PartWorker(self, work, part, order) for part in choice.parts]
        sharing = Sharing(
            found.length, workers, grain=grain_of(found.length), should_stop=order.should_stop, clock=self._clock
        )
        shares: list[Share] = sharing.run()
        work.combine()
        self.last_shares = {str(worker.part.device): share for worker, share in zip(workers, shares, strict=True)}
        return [
            Array(self._home, tensor.shape, buffer) for tensor, buffer in zip(graph.output_types, outputs, strict=True)
        ]

    def _whole(self, work: _SharedWork, number: int, device: Device) -> Data:
        """Return an operand that every range takes all of, on ``device``: copied there once."""
        key = device, number
        if key not in work.whole:
            work.whole[key] = self._operand(work.operands[number], device, self.runners[device])
        return work.whole[key]

    def run_part(self, work: _SharedWork, device: Device, order: Order, start: int, stop: int) -> None:
        """Compute one range of shared work on ``device``."""
        graph, runner = work.split.part(stop - start), self.runners[device]
        targets = work.targets(start, stop)
        with self._turns[device].turn(order.priority):
            inputs = [
                self._operand(part, device, runner) if part is not None else self._whole(work, number, device)
                for number, part in enumerate(work.ranges(start, stop))
            ]
            if runner.takes_arrays:
                outputs: list[Data] = [
                    target if target.flags.c_contiguous else np.empty(target.shape, target.dtype) for target in targets
                ]
            else:
                outputs = list(runner.allocate(graph))
            is_first = not runner.is_prepared(graph)
            device.synchronize()
            started = self._clock.now()
            runner.run(graph, inputs, outputs, order.should_stop)
            device.synchronize()
            self._took(graph, order.name, "part", device, started, is_first=is_first)
            for target, output in zip(targets, outputs, strict=True):
                if isinstance(output, Buffer):
                    output.copy_to(target.reshape(-1) if target.flags.c_contiguous else target)
                elif output is not target:
                    target[...] = output.reshape(target.shape)


class _SharedWork:
    """Operands and results of one kernel that is done in parts."""

    def __init__(
        self, found: Split, operands: Sequence[Any], hosted: list[npt.NDArray[Any]], results: list[npt.NDArray[Any]]
    ) -> None:
        self.split = found
        self.operands, self._hosted, self._results = operands, hosted, results
        self._lock = threading.Lock()
        # Of outputs that are combined: what each range came to, by its start.
        self._partial: list[dict[int, npt.NDArray[Any]]] = [{} for _ in results]
        #: Operands that every range takes all of, by device and number.
        self.whole: dict[tuple[Device, int], Data] = {}

    def ranges(self, start: int, stop: int) -> list[npt.NDArray[Any] | None]:
        """Return what a range takes of each operand; None for those that it takes all of."""
        pairs = zip(self.split.input_axes, self._hosted, strict=True)
        return [None if axis is None else array[(slice(None),) * axis + (slice(start, stop),)] for axis, array in pairs]

    def targets(self, start: int, stop: int) -> list[npt.NDArray[Any]]:
        """Return where a range writes to."""
        found = []
        for number, (axis, result) in enumerate(zip(self.split.output_axes, self._results, strict=True)):
            if axis is not None:
                found.append(result[(slice(None),) * axis + (slice(start, stop),)])
            else:
                part = np.empty_like(result)
                with self._lock:
                    self._partial[number][start] = part
                found.append(part)
        return found

    def combine(self) -> None:
        """Put together what ranges came to, in their order."""
        for op, parts, result in zip(self.split.output_ops, self._partial, self._results, strict=True):
            if op is not None:
                first, *rest = (parts[start] for start in sorted(parts))
                result[...] = first
                for part in rest:
                    _COMBINE[op](result, part, out=result)


class _PartWorker:
    def __init__(self, runtime: Runtime, work: _SharedWork, part: Part, order: Order) -> None:
        self._runtime, self._work, self.part, self._order = runtime, work, part, order
        self.rate, self.overhead_s = part.rate, part.overhead_s

    def run(self, start: int, stop: int) -> None:
        self._runtime.run_part(self._work, self.part.device, self._order, start, stop)


def _is_on(operand: Any, device: Device) -> bool:
    if isinstance(operand, Array):
        return operand.is_on(device)
    return device.capabilities.memory_is_host
