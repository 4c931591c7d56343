"""How long a program will take on a device: a roofline, corrected by what was measured.

Each step takes the larger of its arithmetic over the device's rate and its bytes over the memory's (Williams, Waterman
and Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009), and what a launch costs. Transfers to and
from the device are added. What programs of one form took on one device, compared with that, corrects what is
expected of the next.
"""

from __future__ import annotations

import statistics
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import Literal

from sparkle_mesh import limits
from sparkle_mesh.kernels.accounting import step_bytes, step_flops
from sparkle_mesh.kernels.program import ElementwiseStep, MatmulStep, Program, ReduceStep, Step


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device was measured to do.

    Attributes
    ----------
    gflops
        By dtype, of matrix products.
    memory_bytes_per_s
        Read and written together, by a large copy.
    to_device_bytes_per_s, from_device_bytes_per_s
        Between the host's memory and the device's; infinite where they are the same.
    launch_s
        What one step costs before it does anything.
    """

    gflops: Mapping[str, float]
    memory_bytes_per_s: float
    to_device_bytes_per_s: float
    from_device_bytes_per_s: float
    launch_s: float

    def flops_per_s(self, dtype: str) -> float:
        """Return the rate for ``dtype``; that of float32 for those that were not measured."""
        gflops = self.gflops.get(dtype) or self.gflops.get("float32")
        return gflops * 1e9 if gflops else limits.UNMEASURED_FLOPS_PER_S


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """What one step is expected to take, and why that long.

    Attributes
    ----------
    name
        ``"elementwise"``, ``"reduce"``, ``"matmul"`` or ``"write"``.
    bound
        What takes longest: ``"arithmetic"``, ``"memory"`` or ``"launch"``.
    """

    name: str
    flops: int
    moved_bytes: int
    seconds: float
    bound: Literal["arithmetic", "memory", "launch"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a program is expected to take.

    Attributes
    ----------
    compute_s, transfer_s
        On the device, corrected by ``correction``; to and from it.
    correction
        What it takes for each second of the roofline's; 1 before anything was measured.
    """

    steps: tuple[StepEstimate, ...]
    compute_s: float
    transfer_s: float
    correction: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute_s + self.transfer_s

    @property
    def moved_bytes(self) -> int:
        """Of all steps."""
        return sum(step.moved_bytes for step in self.steps)

    def corrected(self, correction: float) -> Estimate:
        """Return what is expected where a second of the roofline's takes so many."""
        return replace(self, compute_s=self.compute_s * correction, correction=self.correction * correction)


def estimate(program: Program, speed: Speed, *, transfer_s: float = 0.0) -> Estimate:
    """Return how long ``program`` takes on a device of that ``speed``, with the transfers before and after it."""
    steps = tuple(_estimate_step(step, program, speed) for step in program.steps)
    return Estimate(steps, sum(step.seconds for step in steps), transfer_s, 1.0)


def _estimate_step(step: Step, program: Program, speed: Speed) -> StepEstimate:
    flops, moved = step_flops(step), step_bytes(step, program)
    arithmetic_s = flops / speed.flops_per_s(_dtype(step))
    memory_s = moved / speed.memory_bytes_per_s
    bound: Literal["arithmetic", "memory", "launch"] = "arithmetic" if arithmetic_s > memory_s else "memory"
    if max(arithmetic_s, memory_s) < speed.launch_s:
        bound = "launch"
    return StepEstimate(_name(step), flops, moved, speed.launch_s + max(arithmetic_s, memory_s), bound)


def _dtype(step: Step) -> str:
    if isinstance(step, ElementwiseStep):
        return step.body.instructions[-1].dtype if step.body.instructions else step.body.read_dtypes[0]
    return step.dtype


def _name(step: Step) -> str:
    if isinstance(step, ElementwiseStep):
        return "elementwise"
    if isinstance(step, ReduceStep):
        return "reduce"
    return "matmul" if isinstance(step, MatmulStep) else "write"


class Corrections:
    """What programs took on each device for each second of the roofline's; bounded, and for any thread.

    By form and by size in powers of four: what fits a cache is another thing than what does not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ratios: OrderedDict[tuple[str, int], dict[int, deque[float]]] = OrderedDict()

    @staticmethod
    def _size_class(moved_bytes: int) -> int:
        return int(log2(max(moved_bytes, 1)) / 2)

    def measured(self, device: str, graph_form: int, moved_bytes: int, expected_s: float, took_s: float) -> None:
        """A program took ``took_s`` where an uncorrected roofline has ``expected_s``."""
        if expected_s <= 0 or took_s <= 0:
            return
        with self._lock:
            sizes = self._ratios.setdefault((device, graph_form), {})
            self._ratios.move_to_end((device, graph_form))
            ratios = sizes.setdefault(self._size_class(moved_bytes), deque(maxlen=limits.COST_CORRECTION_TIMES_COUNT))
            ratios.append(took_s / expected_s)
            if len(self._ratios) > limits.COST_CORRECTIONS_MAX_COUNT:
                self._ratios.popitem(last=False)

    def correction(self, device: str, graph_form: int, moved_bytes: int, *, otherwise: str | None = None) -> float:
        """Return what to multiply a roofline by: what was measured at this size, else at the nearest, else 1.

        If nothing was measured for ``device``, what was for ``otherwise`` counts.
        """
        wanted = self._size_class(moved_bytes)
        with self._lock:
            known = self._ratios.get((device, graph_form)) or self._ratios.get((otherwise or device, graph_form))
            if not known:
                return 1.0
            # One that was held up says nothing.
            return statistics.median(known[min(known, key=lambda size: (abs(size - wanted), -size))])
