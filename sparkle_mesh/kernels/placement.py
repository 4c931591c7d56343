"""Where a kernel runs: one device or several, by what that is expected to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sparkle_mesh import limits
from sparkle_mesh.devices.detect import usable_logical_cores
from sparkle_mesh.devices.device import Device
from sparkle_mesh.kernels.estimate import Corrections, Estimate, Speed, estimate
from sparkle_mesh.kernels.fusion import fused
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.sharing import first_parts
from sparkle_mesh.kernels.splitting import Split, split


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
    correction
        Of shared work: what it takes for each second that the devices' own speeds would make it.
    """

    devices: tuple[Device, ...]
    seconds: float
    estimate: Estimate | None = None
    parts: tuple[Part, ...] = ()
    correction: float = 1.0

    @property
    def name(self) -> str:
        """The devices, as ``"cpu:0 + cuda:0"``."""
        return " + ".join(map(str, self.devices))


@dataclass(frozen=True, slots=True)
class Gathering:
    """What it takes to have operands where they are needed.

    Attributes
    ----------
    all_s
        To have all of them on a device.
    one_s
        To have one of them there, by its number.
    to_s, from_s
        To copy so many bytes from the host's memory to a device, and back.
    """

    all_s: Callable[[Device], float]
    one_s: Callable[[Device, int], float]
    to_s: Callable[[Device, int], float]
    from_s: Callable[[Device, int], float]


class Placement:
    """Chooses devices for kernels.

    Parameters
    ----------
    devices
        The host's first.
    speed
        What a device was measured to do.
    corrections
        What kernels took.
    host_threads
        How many threads the CPU's device has, which may be fewer than there are cores.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        speed: Callable[[Device], Speed],
        corrections: Corrections,
        *,
        host_threads: int,
    ) -> None:
        self._devices, self._speed, self._corrections = devices, speed, corrections
        self._host_threads = host_threads

    def choices(self, graph: Graph, gathering: Gathering, sharing: Sequence[Device] = ()) -> list[Choice]:
        """Return the ways to run ``graph``, that which is expected to be the fastest first.

        Parameters
        ----------
        sharing
            If any: the only devices that count, and that all of them share it comes first, whether it pays or not.
        """
        usable = [one for one in sharing or self._devices if one in self._devices and self._computes(one, graph)]
        found = [self._whole(graph, device, gathering.all_s(device)) for device in usable]
        best_s = min((choice.seconds for choice in found), default=0.0)
        if len(usable) > 1 and (sharing or best_s >= limits.SHARED_WORK_MIN_S):
            together = usable if sharing else self._without_rivals(found)
            shared = self._shared(graph, together, gathering, is_told=bool(sharing))
            if shared is not None:
                found.append(shared)
        if sharing:
            return sorted(found, key=lambda choice: (not choice.parts, choice.seconds))
        return sorted(found, key=lambda choice: _order(choice, best_s))

    def _cores(self, device: Device) -> int:
        """Return how many of the host's cores a device computes with."""
        cores = device.capabilities.host_cores
        return min(cores, self._host_threads) if device.capabilities.memory_is_host else cores

    def _crowding(self, devices: Sequence[Device]) -> float:
        """Return how many times there are as many users of the host's cores as cores; 1 at least."""
        return max(1.0, sum(map(self._cores, devices)) / max(usable_logical_cores(), 1))

    def _without_rivals(self, found: Sequence[Choice]) -> list[Device]:
        """Return the devices that do not take each other's cores, the fastest ones of those that do."""
        taken: list[Device] = []
        for choice in sorted(found, key=lambda choice: choice.seconds):
            (device,) = choice.devices
            if not self._cores(device) or self._crowding([*taken, device]) == 1:
                taken.append(device)
        return [device for device in self._devices if device in taken]

    @staticmethod
    def _computes(device: Device, graph: Graph) -> bool:
        return {node.dtype for node in graph.nodes} <= device.capabilities.dtypes

    def _estimate(self, graph: Graph, device: Device, transfer_s: float, *, is_part: bool = False) -> Estimate:
        plain = estimate(fused(graph), self._speed(device), transfer_s=transfer_s)
        name = part_name(device) if is_part else str(device)
        return plain.corrected(self._corrections.correction(name, graph.form, plain.moved_bytes, otherwise=str(device)))

    def _whole(self, graph: Graph, device: Device, transfer_s: float) -> Choice:
        found = self._estimate(graph, device, transfer_s)
        return Choice((device,), found.seconds, found)

    def _shared(self, graph: Graph, devices: Sequence[Device], gathering: Gathering, *, is_told: bool) -> Choice | None:
        """Return the work shared by all ``devices`` that would help; None if it cannot be, or fewer than two would.

        If it ``is_told`` what sharing costs does not count: all take part that would do a grain of it.
        """
        found = split(graph)
        if found is None:
            return None
        lines = [self._line(found, device, gathering) for device in devices]
        crowding = self._crowding(devices)
        lines = [
            (rate / crowding if self._cores(device) else rate, overhead)
            for device, (rate, overhead) in zip(devices, lines, strict=True)
        ]
        rates, overheads = [rate for rate, _ in lines], [0.0 if is_told else overhead for _, overhead in lines]
        counts = first_parts(found.length, rates, overheads, grain_of(found.length))
        parts = tuple(
            Part(device, rate, overhead, count)
            for device, rate, overhead, count in zip(devices, rates, overheads, counts, strict=True)
            if count
        )
        if len(parts) < 2:
            return None
        # All begins and ends in the host's memory.
        seconds = gathering.all_s(self._devices[0]) + max(part.overhead_s + part.count / part.rate for part in parts)
        choice = Choice(tuple(part.device for part in parts), seconds, None, parts)
        correction = self._corrections.correction(choice.name, graph.form, _host_bytes(graph))
        return replace(choice, seconds=seconds * correction, correction=correction)

    def learn_shared(self, graph: Graph, choice: Choice, took_s: float) -> None:
        """Shared work took so long, with all that threads and several devices get in each other's way."""
        expected_s = choice.seconds / choice.correction
        self._corrections.measured(choice.name, graph.form, _host_bytes(graph), expected_s, took_s)

    def _line(self, found: Split, device: Device, gathering: Gathering) -> tuple[float, float]:
        """Return a device's rate along the axis, and what each range costs beside: through two lengths."""
        many = found.length
        few = max(many // 8, 1)
        seconds = [self._part_s(found, device, count, gathering) for count in (few, many)]
        if many == few or seconds[1] <= seconds[0]:
            return many / max(seconds[1], 1e-9), 0.0
        per_one = (seconds[1] - seconds[0]) / (many - few)
        return 1 / per_one, max(seconds[0] - few * per_one, 0.0)

    def _part_s(self, found: Split, device: Device, count: int, gathering: Gathering) -> float:
        graph = found.part(count)
        # Ranges are read from the host's memory, and go back there.
        transfer_s = sum(gathering.from_s(device, tensor.nbytes) for tensor in graph.output_types)
        for number, (tensor, axis) in enumerate(zip(graph.inputs, found.input_axes, strict=True)):
            if axis is not None:
                transfer_s += gathering.to_s(device, tensor.nbytes)
            else:
                transfer_s += gathering.one_s(device, number)
        return self._estimate(graph, device, transfer_s, is_part=True).seconds


def _order(choice: Choice, best_s: float) -> float:
    """Sharing has to be worth its trouble."""
    if choice.parts and choice.seconds > limits.SHARED_GAIN_MAX_RATIO * best_s:
        return max(choice.seconds, best_s) * (1 + 1e-9)
    return choice.seconds


def part_name(device: Device) -> str:
    """Return under what name it is kept what parts of shared work take on a device: others work beside it."""
    return f"{device}, sharing"


def _host_bytes(graph: Graph) -> int:
    """Return what is read from the host's memory and written there."""
    return sum(tensor.nbytes for tensor in (*graph.inputs, *graph.output_types))


def grain_of(length: int) -> int:
    """Return the least that is worth a range of its own."""
    return max(-(-length // limits.SHARED_GRAINS_COUNT), 1)
