"""Where a kernel runs: one device or several, by what that is expected to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparkle_mesh import limits
from sparkle_mesh.devices.device import Device
from sparkle_mesh.kernels.estimate import Corrections, Estimate, Speed, estimate, form
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.program import Program
from sparkle_mesh.kernels.sharing import first_parts
from sparkle_mesh.kernels.splitting import Split


@dataclass(frozen=True, slots=True)
class Part:
    """What one device is expected to do of shared work.

    Attributes
    ----------
    rate
        Of the axis that is split, per second.
    overhead_s
        What each range costs beside that.
    count
        How much it begins with.
    """

    device: Device
    rate: float
    overhead_s: float
    count: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a kernel.

    Attributes
    ----------
    parts
        Empty for a kernel that runs whole on one device.
    estimate
        Of the whole there; None if it is shared.
    seconds
        What it is expected to take.
    """

    devices: tuple[Device, ...]
    seconds: float
    estimate: Estimate | None = None
    parts: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        """The devices, as ``"cpu:0 + cuda:0"``."""
        return " + ".join(map(str, self.devices))


class Placement:
    """Chooses devices for kernels.

    Parameters
    ----------
    speed
        What a device was measured to do.
    corrections
        What kernels took.
    """

    def __init__(self, devices: Sequence[Device], speed: Callable[[Device], Speed], corrections: Corrections) -> None:
        self._devices, self._speed, self._corrections = devices, speed, corrections

    def choices(
        self,
        graph: Graph,
        split: Split | None,
        *,
        missing_bytes: Callable[[Device], int],
        input_missing: Callable[[Device, int], bool],
        sharing: Sequence[Device] = (),
    ) -> list[Choice]:
        """Return the ways to run ``graph``, that which is expected to be the fastest first.

        Parameters
        ----------
        split
            How it is done in parts, if it can be.
        missing_bytes
            What of its operands a device lacks.
        input_missing
            Whether a device lacks one of them.
        sharing
            If any: the only devices that count, and that all of them share it comes first, whether it pays or not.
        """
        program = fuse(graph)
        usable = [one for one in self._devices if one in (sharing or self._devices) and self._computes(one, graph)]
        found = [self._whole(graph, program, device, missing_bytes(device)) for device in usable]
        if sharing:
            told = None if split is None else self._shared(split, program, usable, input_missing, is_told=True)
            return [*([told] if told is not None else []), *sorted(found, key=lambda choice: choice.seconds)]
        best_s = min((choice.seconds for choice in found), default=0.0)
        if split is not None and len(usable) > 1 and best_s >= limits.SHARED_WORK_MIN_S:
            shared = self._shared(split, program, usable, input_missing)
            if shared is not None:
                found.append(shared)
        return sorted(found, key=lambda choice: _order(choice, best_s))

    @staticmethod
    def _computes(device: Device, graph: Graph) -> bool:
        return {node.dtype for node in graph.nodes} <= device.capabilities.dtypes

    def estimate(self, graph: Graph, program: Program, device: Device, missing_bytes: int) -> Estimate:
        """Return what ``graph`` is expected to take on ``device``."""
        plain = estimate(program, self._speed(device), to_device_bytes=missing_bytes)
        moved = sum(step.moved_bytes for step in plain.steps)
        correction = self._corrections.correction(str(device), form(graph), moved)
        return estimate(program, self._speed(device), to_device_bytes=missing_bytes, correction=correction)

    def _whole(self, graph: Graph, program: Program, device: Device, missing_bytes: int) -> Choice:
        found = self.estimate(graph, program, device, missing_bytes)
        return Choice((device,), found.seconds, found)

    def _shared(
        self,
        split: Split,
        program: Program,
        devices: Sequence[Device],
        input_missing: Callable[[Device, int], bool],
        *,
        is_told: bool = False,
    ) -> Choice | None:
        """Return the work shared by all ``devices`` that would help; None if fewer than two would.

        If it ``is_told`` what sharing costs does not count: all take part that would do a grain of it.
        """
        if not devices:
            return None
        lines = [self._line(split, device, input_missing) for device in devices]
        rates, overheads = [rate for rate, _ in lines], [0.0 if is_told else overhead for _, overhead in lines]
        counts = first_parts(split.length, rates, overheads, grain_of(split.length))
        parts = tuple(
            Part(device, rate, overhead, count)
            for device, rate, overhead, count in zip(devices, rates, overheads, counts, strict=True)
            if count
        )
        if len(parts) < 2:
            return None
        seconds = max(part.overhead_s + part.count / part.rate for part in parts)
        return Choice(tuple(part.device for part in parts), seconds, None, parts)

    def _line(self, split: Split, device: Device, input_missing: Callable[[Device, int], bool]) -> tuple[float, float]:
        """Return a device's rate along the axis, and what each range costs beside: through two lengths."""
        many = split.length
        few = max(many // 8, 1)
        seconds = [self._part_s(split, device, count, input_missing) for count in (few, many)]
        if many == few or seconds[1] <= seconds[0]:
            return many / max(seconds[1], 1e-9), 0.0
        per_one = (seconds[1] - seconds[0]) / (many - few)
        return 1 / per_one, max(seconds[0] - few * per_one, 0.0)

    def _part_s(self, split: Split, device: Device, count: int, input_missing: Callable[[Device, int], bool]) -> float:
        graph = split.part(count)
        there = back = 0
        # Parts are read from the host's memory, and go back there.
        if not device.capabilities.memory_is_host:
            for number, (tensor, axis) in enumerate(zip(graph.inputs, split.input_axes, strict=True)):
                there += tensor.nbytes if axis is not None or input_missing(device, number) else 0
            back = sum(tensor.nbytes for tensor in graph.output_types)
        program = fuse(graph)
        plain = estimate(program, self._speed(device))
        moved = sum(step.moved_bytes for step in plain.steps)
        correction = self._corrections.correction(str(device), form(graph), moved)
        return estimate(
            program, self._speed(device), to_device_bytes=there, from_device_bytes=back, correction=correction
        ).seconds


def _order(choice: Choice, best_s: float) -> float:
    """Sharing has to be worth its trouble."""
    if choice.parts and choice.seconds > limits.SHARED_GAIN_MAX_RATIO * best_s:
        return max(choice.seconds, best_s) * (1 + 1e-9)
    return choice.seconds


def grain_of(length: int) -> int:
    """Return the least that is worth a range of its own."""
    return max(-(-length // limits.SHARED_GRAINS_COUNT), 1)
