"""Runs kernels: gathers operands where they are needed, on one device or on several, and learns what that takes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.devices.buffers import Buffer
from sparkle_mesh.devices.device import Device
from sparkle_mesh.errors import KernelStoppedError, UsageError
from sparkle_mesh.kernels.accounting import program_demand
from sparkle_mesh.kernels.array import Array, Home
from sparkle_mesh.kernels.cpu_executor import CpuExecutor
from sparkle_mesh.kernels.estimate import Corrections, Speed, estimate
from sparkle_mesh.kernels.events import Event, Recorder
from sparkle_mesh.kernels.fusion import fused
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.ops import OPS
from sparkle_mesh.kernels.placement import Choice, Gathering, Part, Placement, grain_of, part_name
from sparkle_mesh.kernels.runners import Data, Runner, Stop
from sparkle_mesh.kernels.sharing import Share, Sharing
from sparkle_mesh.kernels.splitting import Split, split
from sparkle_mesh.kernels.turns import Turns

# Copies by their direction, where programs have their form.
_TO, _FROM = 0, 1


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
        What a device was measured to do: it may measure it first.
    known_speed
        The same, or None if it was not measured.
    """

    def __init__(
        self,
        home: Home,
        devices: Sequence[Device],
        speed: Callable[[Device], Speed],
        known_speed: Callable[[Device], Speed | None],
        *,
        threads: int | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._home, self._clock, self._speed, self._known_speed = home, clock, speed, known_speed
        self.cpu = CpuExecutor(threads)
        self.runners = {device: Runner(device, self.cpu) for device in devices}
        self.host = devices[0]
        self._turns = {device: Turns() for device in devices}
        self.corrections = Corrections()
        # Of copies between a device and ordinary memory, which take more than the bus does.
        self.transfers = Corrections()
        # Devices that hold nothing compute nothing that anybody wants.
        useful = [one for one in devices if not one.capabilities.keeps_nothing]
        self.placement = Placement(useful, speed, self.corrections, host_threads=self.cpu.threads)
        self.recorder = Recorder()
        self._lock = threading.Lock()
        self._decisions: OrderedDict[tuple[Any, ...], _Decision] = OrderedDict()
        self._run_counts: OrderedDict[tuple[str, int], int] = OrderedDict()
        #: What each device did of the shared work that ended last.
        self.last_shares: dict[str, Share] = {}

    # --- Choosing ---------------------------------------------------------------------------------

    def choices(self, graph: Graph, operands: Sequence[Any], sharing: Sequence[Device] = ()) -> list[Choice]:
        """Return the ways to run ``graph`` with ``operands``, the best first.

        Parameters
        ----------
        sharing
            If any: the only devices that count; that they share it comes first, if that can be.
        """

        def one_s(device: Device, number: int) -> float:
            return self._gather_s(operands[number], graph.inputs[number].nbytes, device)

        def all_s(device: Device) -> float:
            return sum(one_s(device, number) for number in range(len(operands)))

        found = self.placement.choices(
            graph, Gathering(all_s, one_s, partial(self._to_s, is_part=True), self._from_s), sharing
        )
        if not found:
            dtypes = ", ".join(sorted({node.dtype for node in graph.nodes}))
            known = ", ".join(map(str, sharing or self.runners))
            raise UsageError(f"no device computes with all of {dtypes} among {known}")
        return found

    def _best(self, graph: Graph, operands: Sequence[Any], sharing: Sequence[Device]) -> Choice:
        """Return the best way to run ``graph``.

        To look for it takes as long as a small kernel: it is done each time while the first runs are measured, and
        then once in as many runs as these are.
        """
        places = tuple(operand.whereabouts() if isinstance(operand, Array) else None for operand in operands)
        key = graph, tuple(sharing), places
        with self._lock:
            known = self._decisions.get(key)
            if known is not None and known.uses_left:
                known.uses_left -= 1
                return known.best
        looks = 1 if known is None else known.looks + 1
        uses_left = limits.TIMED_RUNS_PERIOD_COUNT - 1 if looks > limits.TIMED_RUNS_COUNT + 1 else 0
        best = self.choices(graph, operands, sharing)[0]
        with self._lock:
            self._decisions[key] = _Decision(best, looks, uses_left)
            self._decisions.move_to_end(key)
            if len(self._decisions) > limits.PREPARED_PROGRAMS_MAX_COUNT:
                self._decisions.popitem(last=False)
        return best

    def _gather_s(self, operand: Any, nbytes: int, device: Device) -> float:
        """Return what it takes to have ``operand`` on ``device``, through the host's memory if it is on another."""
        seconds = 0.0
        if isinstance(operand, Array):
            where = operand.whereabouts()
            if device in where:
                return 0.0
            if where[0] is not self.host:
                seconds += self._from_s(where[0], nbytes)
        return seconds + self._to_s(device, nbytes)

    def _to_s(self, device: Device, nbytes: int, *, is_part: bool = False) -> float:
        plain_s = nbytes / self._speed(device).to_device_bytes_per_s
        name = part_name(device) if is_part else str(device)
        return plain_s * self.transfers.correction(name, _TO, nbytes, otherwise=str(device))

    def _from_s(self, device: Device, nbytes: int) -> float:
        plain_s = nbytes / self._speed(device).from_device_bytes_per_s
        # Measured where parts of shared work end.
        return plain_s * self.transfers.correction(part_name(device), _FROM, nbytes)

    def turn(self, device: Device, priority: int = 0) -> AbstractContextManager[None]:
        """Return a context in which nothing else of this runs on ``device``."""
        return self._turns[device].turn(priority)

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
        self._check_stop(order)
        if order.device is not None:
            return self._run_whole(graph, operands, order, order.device)
        if len(self.runners) == 1:
            return self._run_whole(graph, operands, order, self.host)
        best = self._best(graph, operands, order.sharing)
        if best.parts:
            return self.run_shared(graph, operands, order, best)
        return self._run_whole(graph, operands, order, best.devices[0])

    def _run_whole(self, graph: Graph, operands: Sequence[Any], order: Order, device: Device) -> list[Array]:
        runner = self.runners[device]
        with self.turn(device, order.priority):
            self._check_stop(order)
            is_timed = self._is_to_be_timed(graph, device)
            inputs = [self._gathered(operand, runner, str(device), is_timed=is_timed) for operand in operands]
            outputs = runner.allocate(graph)
            took = self._run_timed(graph, order, runner, inputs, outputs, is_timed=is_timed)
        self._learn(graph, order.name, device, took, is_part=False)
        return self._arrays(graph, outputs)

    def _arrays(self, graph: Graph, buffers: Sequence[Buffer]) -> list[Array]:
        pairs = zip(graph.output_types, buffers, strict=True)
        return [Array(self._home, tensor.shape, buffer) for tensor, buffer in pairs]

    @staticmethod
    def _check_stop(order: Order) -> None:
        if order.should_stop():
            raise KernelStoppedError(f"kernel {order.name} was cancelled before it ran")

    def _operand(self, operand: Any, device: Device, runner: Runner) -> Data:
        if isinstance(operand, Array):
            return operand.buffer_on(device)
        array = np.ascontiguousarray(operand)
        if runner.takes_arrays:
            return array
        return Buffer(array.size, array.dtype, device).copy_from(array)

    def _gathered(self, operand: Any, runner: Runner, kept_as: str, *, is_timed: bool) -> Data:
        """Return ``operand`` on a device; if it comes there from the host's memory, learn what that takes."""
        device = runner.device
        speed = None if not is_timed or device.capabilities.memory_is_host else self._known_speed(device)
        if speed is None or (isinstance(operand, Array) and operand.whereabouts()[0] is not self.host):
            return self._operand(operand, device, runner)
        if isinstance(operand, Array) and device in operand.whereabouts():
            return self._operand(operand, device, runner)
        device.synchronize()
        started = self._clock.now()
        data = self._operand(operand, device, runner)
        device.synchronize()
        took_s = self._clock.now() - started
        self.transfers.measured(kept_as, _TO, data.nbytes, data.nbytes / speed.to_device_bytes_per_s, took_s)
        return data

    def _run_timed(
        self,
        graph: Graph,
        order: Order,
        runner: Runner,
        inputs: Sequence[Data],
        outputs: Sequence[Data],
        *,
        is_timed: bool,
    ) -> _Took | None:
        """Run ``graph``; time it if that is of use: then the device is waited for."""
        device = runner.device
        if not is_timed:
            runner.run(graph, inputs, outputs, order.should_stop)
            return None
        is_first = not runner.is_prepared(graph)
        device.synchronize()
        started = self._clock.now()
        runner.run(graph, inputs, outputs, order.should_stop)
        device.synchronize()
        return _Took(started, self._clock.now() - started, is_first)

    def _is_to_be_timed(self, graph: Graph, device: Device) -> bool:
        if self.recorder.is_wanted:
            return True
        if len(self.runners) == 1:
            return False
        with self._lock:
            key = str(device), graph.form
            count = self._run_counts[key] = self._run_counts.pop(key, 0) + 1
            if len(self._run_counts) > limits.COST_CORRECTIONS_MAX_COUNT:
                self._run_counts.popitem(last=False)
        # Of the first run some time goes into making it ready.
        return 1 < count <= limits.TIMED_RUNS_COUNT + 1 or count % limits.TIMED_RUNS_PERIOD_COUNT == 0

    def _learn(self, graph: Graph, name: str, device: Device, took: _Took | None, *, is_part: bool) -> None:
        """Remember what a run took; not in a turn, and without measuring the device for it."""
        if took is None:
            return
        speed = self._known_speed(device)
        details: dict[str, float | int | str] = {}
        if speed is not None:
            plain = estimate(fused(graph), speed)
            kept_as = part_name(device) if is_part else str(device)
            before = self.corrections.correction(kept_as, graph.form, plain.moved_bytes)
            details["expected_us"] = plain.compute_s * before * 1e6
            # Of the first run some time went into making it ready: the next ones will not take that.
            if not took.is_first:
                self.corrections.measured(kept_as, graph.form, plain.moved_bytes, plain.compute_s, took.seconds)
        if self.recorder.is_wanted:
            demand = program_demand(fused(graph))
            details |= {"bytes": demand.moved_bytes, "flops": demand.flops}
            category = "part" if is_part else "kernel"
            self.recorder.add(Event(name, category, str(device), took.started, took.seconds, details))

    def close(self) -> None:
        """End the CPU's threads."""
        self.cpu.close()

    # --- Sharing ----------------------------------------------------------------------------------

    def run_shared(self, graph: Graph, operands: Sequence[Any], order: Order, choice: Choice) -> list[Array]:
        """Return the outputs of ``graph``, computed by several devices; they are in the host's memory."""
        found = split(graph)
        assert found is not None
        hosted = [np.asarray(operand) for operand in operands]
        outputs = self.runners[self.host].allocate(graph)
        pairs = zip(outputs, graph.output_types, strict=True)
        results = [buffer.view().reshape(tensor.shape) for buffer, tensor in pairs]
        work = _SharedWork(found, operands, hosted, results)
        workers = [_PartWorker(self, work, part, order) for part in choice.parts]
        sharing = Sharing(
            found.length,
            workers,
            counts=[part.count for part in choice.parts],
            grain=grain_of(found.length),
            should_stop=order.should_stop,
            clock=self._clock,
        )
        started = self._clock.now()
        shares: list[Share] = sharing.run()
        work.combine()
        if not work.made_ready:
            self.placement.learn_shared(graph, choice, self._clock.now() - started)
        self.last_shares = {str(worker.part.device): share for worker, share in zip(workers, shares, strict=True)}
        return self._arrays(graph, outputs)

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
        with self.turn(device, order.priority):
            inputs = [
                self._whole(work, number, device)
                if part is None
                else self._gathered(part, runner, part_name(device), is_timed=True)
                for number, part in enumerate(work.ranges(start, stop))
            ]
            if runner.takes_arrays:
                outputs: list[Data] = [
                    target if target.flags.c_contiguous else np.empty(target.shape, target.dtype) for target in targets
                ]
            else:
                outputs = list(runner.allocate(graph))
            took = self._run_timed(graph, order, runner, inputs, outputs, is_timed=True)
            for target, output in zip(targets, outputs, strict=True):
                if isinstance(output, Buffer):
                    self._fetch(output, target.reshape(-1) if target.flags.c_contiguous else target)
                elif output is not target:
                    target[...] = output.reshape(target.shape)
        work.add(device, targets)
        work.made_ready |= took is not None and took.is_first
        self._learn(graph, order.name, device, took, is_part=True)

    def _fetch(self, source: Buffer, target: npt.NDArray[Any]) -> None:
        """Copy a result that is there to the host's memory, and learn what that takes."""
        speed, device = self._known_speed(source.device), source.device
        started = self._clock.now()
        source.copy_to(target)
        took_s = self._clock.now() - started
        if speed is not None:
            expected_s = target.nbytes / speed.from_device_bytes_per_s
            self.transfers.measured(part_name(device), _FROM, target.nbytes, expected_s, took_s)


@dataclass(slots=True)
class _Decision:
    """How a kernel is run, how often that was looked for, and how often it may be used yet."""

    best: Choice
    looks: int
    uses_left: int


@dataclass(frozen=True, slots=True)
class _Took:
    """When a run began, what it took, and whether it was made ready first."""

    started: float
    seconds: float
    is_first: bool


class _SharedWork:
    """Operands and results of one kernel that is done in parts."""

    def __init__(
        self, found: Split, operands: Sequence[Any], hosted: list[npt.NDArray[Any]], results: list[npt.NDArray[Any]]
    ) -> None:
        self.split = found
        self.operands, self._hosted, self._results = operands, hosted, results
        # Of outputs that are combined: what each device has come to so far, by its name and the output's number.
        self._sums: dict[tuple[str, int], npt.NDArray[Any]] = {}
        #: Whether some of the time went into making kernels ready.
        self.made_ready = False
        #: Operands that every range takes all of, by device and number.
        self.whole: dict[tuple[Device, int], Data] = {}

    def ranges(self, start: int, stop: int) -> list[npt.NDArray[Any] | None]:
        """Return what a range takes of each operand; None for those that it takes all of."""
        pairs = zip(self.split.input_axes, self._hosted, strict=True)
        return [None if axis is None else array[(slice(None),) * axis + (slice(start, stop),)] for axis, array in pairs]

    def targets(self, start: int, stop: int) -> list[npt.NDArray[Any]]:
        """Return where a range writes to."""
        found = []
        for axis, result in zip(self.split.output_axes, self._results, strict=True):
            if axis is not None:
                found.append(result[(slice(None),) * axis + (slice(start, stop),)])
            else:
                found.append(np.empty_like(result))
        return found

    def add(self, device: Device, targets: Sequence[npt.NDArray[Any]]) -> None:
        """A range has been computed on ``device``: add what is combined to what that device has."""
        for number, (op, target) in enumerate(zip(self.split.output_ops, targets, strict=True)):
            if op is None:
                continue
            key = str(device), number
            if key in self._sums:
                _ufunc(op)(self._sums[key], target, out=self._sums[key])
            else:
                # float16 is added up in float32, as in one piece.
                self._sums[key] = target.astype(np.float32) if target.dtype == np.float16 else target

    def combine(self) -> None:
        """Put together what the devices came to."""
        for number, (op, result) in enumerate(zip(self.split.output_ops, self._results, strict=True)):
            if op is not None:
                first, *rest = (self._sums[key] for key in sorted(self._sums) if key[1] == number)
                for other in rest:
                    _ufunc(op)(first, other, out=first)
                result[...] = first


def _ufunc(op: str) -> np.ufunc:
    found = OPS[op].ufunc
    assert found is not None
    return found


class _PartWorker:
    def __init__(self, runtime: Runtime, work: _SharedWork, part: Part, order: Order) -> None:
        self._runtime, self._work, self.part, self._order = runtime, work, part, order
        self.rate, self.overhead_s = part.rate, part.overhead_s

    def run(self, start: int, stop: int) -> None:
        self._runtime.run_part(self._work, self.part.device, self._order, start, stop)
