"""The devices of this machine as one place to compute: ``sparkle.init()``."""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.devices.buffers import Buffer, plain_dtype
from sparkle_mesh.devices.device import Device
from sparkle_mesh.devices.kept_profiles import DeviceProfile
from sparkle_mesh.devices.profiles import ProfileStore
from sparkle_mesh.devices.registry import Registry
from sparkle_mesh.environment import resolve_data_dir
from sparkle_mesh.errors import ClosedError, ForkedProcessError, UsageError
from sparkle_mesh.kernels.array import Array, as_of_now
from sparkle_mesh.kernels.copies import SpareCopies
from sparkle_mesh.kernels.estimate import Estimate, Speed
from sparkle_mesh.kernels.events import Profile
from sparkle_mesh.kernels.explanation import Explanation
from sparkle_mesh.kernels.frozen import thaw
from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.ops import Shape, TensorType, as_dtype, check_type
from sparkle_mesh.kernels.pending import PendingRun, Submissions
from sparkle_mesh.kernels.runners import Stop
from sparkle_mesh.kernels.runtime import Order, Runtime
from sparkle_mesh.kernels.tracing import Kernel, as_kernel, execute_by_numpy, set_execute


class Context:
    """This machine's devices, arrays on them, and kernels that run there. Made by :func:`init`.

    Parameters
    ----------
    devices
        Names (``"cuda:0"``), kinds (``"opencl"``) or devices to use, beside the CPU; all that there are by default.
    data_dir
        Where profiles of devices are kept; the project's own directory by default (``SPARKLE_DATA_DIR``).
    threads
        Of the CPU's device; one for each core by default.
    registry
        Where devices are looked for.

    Raises
    ------
    UsageError
        If there is no such device.
    """

    def __init__(
        self,
        devices: str | Device | Sequence[str | Device] | None = None,
        *,
        data_dir: Path | str | None = None,
        threads: int | None = None,
        registry: Registry | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._registry = registry or Registry()
        # One that is given is its owner's, who may use it for others.
        self._owns_registry = registry is None
        self._profiles = ProfileStore(resolve_data_dir(data_dir), clock=clock)
        self._known_profiles: dict[Device, DeviceProfile] = {}
        self._profiling = threading.Lock()
        self.devices: tuple[Device, ...] = self._choose(devices)
        self._runtime = Runtime(self, self.devices, self._speed, self._known_speed, threads=threads, clock=clock)
        self._submissions = Submissions(len(self.devices) + 1)
        self._methods = lru_cache(limits.ARRAY_METHODS_MAX_COUNT)(_method_kernel)
        self._closing = threading.Lock()
        self._process = os.getpid()
        self._is_closed = False
        self._copies = SpareCopies()
        for device in self.devices:
            device.pool.add_reclaimer(self._copies)

    def _choose(self, devices: str | Device | Sequence[str | Device] | None) -> tuple[Device, ...]:
        host = self._registry.device("cpu")
        if devices is None:
            return host, *(device for device in self._registry.devices() if device not in (host,))
        found = [host]
        for name in [devices] if isinstance(devices, (str, Device)) else devices:
            is_kind = isinstance(name, str) and ":" not in name
            some = self._registry.devices(name) if is_kind and isinstance(name, str) else ()
            found += some or (self._registry.device(name),)
        return tuple(dict.fromkeys(found))

    # --- Devices ----------------------------------------------------------------------------------

    @property
    def host(self) -> Device:
        """The CPU, whose memory is the host's."""
        return self.devices[0]

    def device(self, name: str | Device) -> Device:
        """Return the device called ``name``: ``"cuda:1"``, or ``"cuda"`` for the first of its kind.

        Raises
        ------
        UsageError
            If there is none; the message names those that there are.
        """
        if isinstance(name, Device):
            if name not in self.devices:
                raise UsageError(f"{name!r} is not of this context, which has {', '.join(map(str, self.devices))}")
            return name
        kind, _, index = str(name).partition(":")
        for device in self.devices:
            if device.kind == kind and index in ("", str(device.index)):
                return device
        raise UsageError(f"there is no device {name!r} here; there are {', '.join(map(str, self.devices))}")

    def device_profile(self, device: str | Device) -> DeviceProfile:
        """Return what a device was measured to do: once, in a second or two, and kept for the next time.

        Raises
        ------
        DeviceError
            If the device fails while it is measured.
        """
        self._check_open()
        found = self.device(device)
        with self._profiling:
            if found not in self._known_profiles:
                # With nothing else on it: what is measured is kept on disk.
                with self._runtime.turn(found):
                    self._known_profiles[found] = self._profiles.profile(found)
            return self._known_profiles[found]

    def _speed(self, device: Device) -> Speed:
        return _speed_of(device, self._known_profiles.get(device) or self.device_profile(device))

    def _known_speed(self, device: Device) -> Speed | None:
        profile = self._known_profiles.get(device)
        return None if profile is None else _speed_of(device, profile)

    def synchronize(self) -> None:
        """Wait until all devices have done what they were given."""
        for device in self.devices:
            device.synchronize()

    # --- Memory and arrays ------------------------------------------------------------------------

    def allocate(self, size: int, dtype: npt.DTypeLike = "float32", device: str | Device = "auto") -> Buffer:
        """Return a buffer of ``size`` elements; they hold anything until they are written.

        Parameters
        ----------
        device
            Where; ``"auto"`` is the one with the fastest memory that has room.

        Raises
        ------
        OutOfMemoryError
            If there is no room; the message names the device, what was asked, what is free, and what could be freed.
        UsageError
            If size, dtype or device are none.
        """
        self._check_open()
        count = _length(size, f"size is {size!r}; give a number of elements (array() takes a shape)")
        return Buffer(count, dtype, self._memory_for(count, dtype, device))

    def _memory_for(self, size: int, dtype: npt.DTypeLike, device: str | Device) -> Device:
        if device != "auto":
            return self.device(device)
        nbytes = size * plain_dtype(dtype).itemsize
        usable = [one for one in self.devices if not one.capabilities.keeps_nothing]
        if len(usable) == 1:
            return usable[0]
        roomy = [one for one in usable if one.free_memory_bytes() + one.pool.kept_bytes >= nbytes]
        return max(roomy or usable, key=lambda one: (self._speed(one).memory_bytes_per_s, -usable.index(one)))

    def array(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike = "float32", device: str | Device = "auto"
    ) -> Array:
        """Return an array of zeros; see :meth:`asarray` for one of given elements, and :meth:`allocate` for errors."""
        self._check_open()
        lengths = _as_shape(shape)
        size = math.prod(lengths)
        where = self._memory_for(size, as_dtype(dtype), device)
        buffer = Buffer(size, as_dtype(dtype), where)
        where.clear(buffer.memory, buffer.nbytes)
        return Array(self, lengths, buffer)

    def asarray(self, values: Any, dtype: npt.DTypeLike | None = None, device: str | Device = "auto") -> Array:
        """Return an array with the elements of ``values``: itself if it is one, else a copy of what NumPy makes of it.

        Where no device is told, the elements are put into the host's memory, and copied when a device needs them.
        """
        self._check_open()
        if isinstance(values, Array) and not values.is_of(self):
            # Another context's: it may be closed any time.
            values = values.to_numpy()
        if isinstance(values, Array):
            found = values if dtype is None or np.dtype(dtype) == values.dtype else values.astype(np.dtype(dtype))
            return found if device == "auto" else found.to_device(self.device(device))
        try:
            source = np.asarray(values, dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"these values make no array of {dtype or 'one dtype'}: {error}") from error
        # In the machine's order of bytes.
        source = source.astype(as_dtype(source.dtype), copy=False)
        where = self.host if device == "auto" else self.device(device)
        return Array(self, source.shape, Buffer(source.size, source.dtype, where).copy_from(source))

    def gemm(self, a: Any, b: Any, *, device: str | Device = "auto") -> Array:
        """Return the matrix product ``a @ b``, as ``numpy.matmul`` defines it."""
        factors = (one if isinstance(one, Array) else np.asarray(one) for one in (a, b))
        found: Array = self.run(_GEMM, *factors, device=device)
        return found

    # --- Kernels ----------------------------------------------------------------------------------

    def run(
        self,
        kernel: Any,
        *operands: Any,
        device: str | Device | Sequence[str | Device] = "auto",
        priority: int = 0,
        should_stop: Stop = lambda: False,
        **keywords: Any,
    ) -> Any:
        """Run a kernel; return what its function returns, of :class:`Array`.

        On a GPU the work may still be going on when this returns; whoever reads the result waits for it.

        Parameters
        ----------
        kernel
            One made by ``sparkle.kernel``, or a function that could be.
        device
            Where; ``"auto"`` is wherever it is expected to be fastest, on several devices together perhaps. Several, as
            ``["cpu", "cuda:0"]`` or ``context.devices``, share it whether that pays or not; if it cannot be done in
            parts, the fastest of them does it.
        priority
            Of those that wait for a device the highest comes first.
        should_stop
            Asked between pieces of the work; if it says so, KernelStoppedError is raised.

        Raises
        ------
        TraceError
            If the kernel cannot be traced.
        OutOfMemoryError, DeviceError, KernelStoppedError
            As it says.
        """
        self._check_open()
        found = as_kernel(kernel)
        order = self._order(found.name, device, priority, should_stop)
        call = found.prepare(*operands, **keywords)
        return call.rebuild(self._runtime.run(call.graph, call.operands, order))

    def submit(
        self,
        kernel: Any,
        *operands: Any,
        device: str | Device | Sequence[str | Device] = "auto",
        priority: int = 0,
        **keywords: Any,
    ) -> PendingRun:
        """Run a kernel in the background, the most urgent first; see :meth:`run`.

        It computes with the operands as they are now: NumPy's arrays are copied for that.
        """
        self._check_open()
        # What is wrong with the call is told now, and not to who asks for the result.
        found = as_kernel(kernel)
        call = found.prepare(*operands, **keywords)
        order = self._order(found.name, device, priority, lambda: False)
        # What the caller does to them later is nothing to this kernel.
        call = replace(call, operands=tuple(map(as_of_now, call.operands)))

        def work(should_stop: Stop) -> Any:
            # Also while the context is being closed, which waits for it.
            return call.rebuild(self._runtime.run(call.graph, call.operands, replace(order, should_stop=should_stop)))

        return self._submissions.submit(work, priority)

    def _order(
        self, name: str, device: str | Device | Sequence[str | Device], priority: int, should_stop: Stop
    ) -> Order:
        if isinstance(priority, bool) or not isinstance(priority, (int, np.integer)):
            raise UsageError(f"priority is {priority!r}; give a whole number, more for what is more urgent")
        if isinstance(device, (list, tuple)):
            several = tuple(dict.fromkeys(map(self.device, device)))
            if not several:
                raise UsageError(f"device is {device!r}; name at least one, or leave it to 'auto'")
            if len(several) > 1:
                return Order(name, None, priority, should_stop, several)
            device = several[0]
        found = None if device == "auto" else self.device(device)  # type: ignore[arg-type]
        return Order(name, found, priority, should_stop)

    def estimate_performance(self, kernel: Any, *operands: Any, device: str | Device, **keywords: Any) -> Estimate:
        """Return what a kernel is expected to take on a device, step by step; nothing is run."""
        self._check_open()
        call = as_kernel(kernel).prepare(*operands, **keywords)
        found = self._runtime.choices(call.graph, call.operands, (self.device(device),))[0].estimate
        assert found is not None
        return found

    def explain(self, kernel: Any, *operands: Any, **keywords: Any) -> Explanation:
        """Return where a kernel would run, and why: print it. Nothing is run, but devices are measured if need be."""
        self._check_open()
        found = as_kernel(kernel)
        call = found.prepare(*operands, **keywords)
        return Explanation(found.name, call.graph, tuple(self._runtime.choices(call.graph, call.operands)))

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Yield a profile of what runs in the block: ``print(profile)`` is a table, ``profile.save(path)`` a trace.

        Every kernel is waited for meanwhile, so that its time is its own.
        """
        self._check_open()
        with self._runtime.recorder.profile() as found:
            yield found

    # --- For arrays -------------------------------------------------------------------------------

    def method(self, name: str, static: tuple[object, ...], keywords: tuple[tuple[str, object], ...]) -> Kernel:
        """Return a kernel that calls that method of its first operand, with the others, then what is ``static``."""
        return self._methods(name, static, keywords)

    def has_copies(self, array: Array) -> None:
        """``array`` is on several devices now: what of it is spare may be asked for when memory is short."""
        self._copies.add(array)

    # --- Life -------------------------------------------------------------------------------------

    def execute(self, graph: Graph, operands: Sequence[Any], name: str, /) -> Sequence[Any]:
        """Run the graph of a kernel that was called by itself; NumPy arrays if there are no others among operands."""
        self._check_open()
        results = self._runtime.run(graph, operands, Order(name))
        if any(isinstance(operand, Array) for operand in operands):
            return results
        return [result.buffer_on(self.host).view().reshape(result.shape) for result in results]

    def close(self) -> None:
        """Wait for what was submitted, and give back what the devices keep. Closing twice is no error."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        _no_longer_current(self)
        self._submissions.close()
        self._runtime.close()
        for device in self.devices:
            device.pool.remove_reclaimer(self._copies)
        if self._owns_registry:
            self._registry.close()

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise ForkedProcessError(
                f"this context belongs to process {self._process}; the forked process {os.getpid()} cannot use it"
                " (open another here, or start workers by spawn)"
            )
        if self._is_closed:
            raise ClosedError("this context is closed; call sparkle.init() again")

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Context of {', '.join(map(str, self.devices))}>"


@dataclass(frozen=True)
class _Method:
    """One method of arrays, or one of NumPy's functions, to be traced.

    No function: what goes wrong in it is told of the line that called for it, and not of one in here.
    """

    name: str
    static: tuple[object, ...]
    keywords: tuple[tuple[str, object], ...]

    def __call__(self, *operands: Any) -> Any:
        keywords = {name: thaw(value) for name, value in self.keywords}
        if self.name == "__array_ufunc__":
            return thaw(self.static[0])(*operands, **keywords)
        if self.name == "__array_function__":
            arguments, named = thaw(self.static[1], operands)
            return thaw(self.static[0])(*arguments, **dict(named))
        return getattr(operands[0], self.name)(*operands[1:], *map(thaw, self.static), **keywords)


def _method_kernel(name: str, static: tuple[object, ...], keywords: tuple[tuple[str, object], ...]) -> Kernel:
    """Return a kernel for one method of arrays, or one of NumPy's functions."""
    shown = getattr(thaw(static[0]), "__name__", name) if name.startswith("__array_") else name.strip("_")
    return Kernel(_Method(name, static, keywords), name=str(shown))


def _length(value: Any, what: str) -> int:
    """Return ``value`` as a number of elements; raises UsageError(``what``) if it is none."""
    try:
        found = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError as error:
        raise UsageError(what) from error
    if found < 0:
        raise UsageError(what)
    return found


def _as_shape(shape: Any) -> Shape:
    what = f"shape is {shape!r}; give a whole number, or a sequence of them, each 0 or more"
    if isinstance(shape, (str, bytes)) or not hasattr(shape, "__iter__"):
        return (_length(shape, what),)
    found = tuple(_length(length, what) for length in shape)
    check_type(TensorType((1,) * len(found), "bool"))
    return found


def _speed_of(device: Device, profile: DeviceProfile) -> Speed:
    there, back = profile.to_device_bytes_per_s, profile.from_device_bytes_per_s
    if device.capabilities.memory_is_host:
        there = back = math.inf
    unmeasured = limits.UNMEASURED_BYTES_PER_S
    memory = profile.memory_bytes_per_s or unmeasured
    return Speed(profile.gflops, memory, there or unmeasured, back or unmeasured, profile.launch_s)


_GEMM = Kernel(operator.matmul, name="gemm")

_current_lock = threading.Lock()
# Contexts of init that are open, in the order in which they were made: kernels run on the last.
_current: list[Context] = []


def init(
    devices: str | Device | Sequence[str | Device] | None = None,
    *,
    data_dir: Path | str | None = None,
    threads: int | None = None,
) -> Context:
    """Return a context of this machine's devices; kernels that are called by themselves run on it until it is closed.

    Of several that are open they run on the one that was made last.

    Parameters
    ----------
    devices
        Names (``"cuda:0"``) or kinds (``"opencl"``) to use beside the CPU; all that there are by default.
    data_dir
        Where profiles of devices are kept.
    threads
        Of the CPU's device; one for each core by default.

    Raises
    ------
    UsageError
        If there is no such device.
    """
    context = Context(devices, data_dir=data_dir, threads=threads)
    with _current_lock:
        _current.append(context)
        set_execute(context.execute)
    return context


def _leave_to_parent() -> None:
    """In a forked child: kernels that are called by themselves do without the parent's contexts."""
    global _current_lock
    _current_lock = threading.Lock()
    _current.clear()
    set_execute(execute_by_numpy)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _no_longer_current(context: Context) -> None:
    with _current_lock:
        if context in _current:
            _current.remove(context)
            set_execute(_current[-1].execute if _current else execute_by_numpy)
