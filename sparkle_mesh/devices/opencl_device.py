"""Devices of any maker through PyOpenCL: GPUs, accelerators, and processors under PoCL.

Each device has a context and one in-order queue of its own, so blocks of two devices cannot be copied directly.
The only file that imports pyopencl.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from sparkle_mesh import limits
from sparkle_mesh.devices import opencl_source
from sparkle_mesh.devices.batches import batch_starts
from sparkle_mesh.devices.compiled import CompiledKernel
from sparkle_mesh.devices.detect import DeviceInfo, free_memory_bytes
from sparkle_mesh.devices.device import Backend, Device, DeviceCapabilities, Native
from sparkle_mesh.devices.products import Product
from sparkle_mesh.errors import CompileError, DeviceError, UsageError

# Of PCI, which OpenCL's vendor_id is for GPUs. Whose GPUs another backend serves, by the kind of that.
_VENDORS = {"cuda": 0x10DE, "rocm": 0x1002}
_INVALID_BUFFER_SIZE = -61
_NO_PLATFORM = -1001
_NO_DEVICE = -1


class OpenClBackend(Backend):
    """Finds the devices of all OpenCL platforms.

    Parameters
    ----------
    served_kinds
        Kinds of other backends that have devices: the GPUs of their makers are left out, because they are the same.
    """

    def __init__(self, *, served_kinds: Sequence[str] = ()) -> None:
        self._left_out = {_VENDORS[kind] for kind in served_kinds if kind in _VENDORS}
        self._devices: tuple[Device, ...] | None = None

    @property
    def kind(self) -> str:
        """The kind of its devices."""
        return "opencl"

    def devices(self) -> tuple[Device, ...]:
        """Return the devices, by platform."""
        if self._devices is None:
            found = [device for platform in _platforms() for device in _devices_of(platform) if self._wants(device)]
            self._devices = tuple(OpenClDevice(index, device) for index, device in enumerate(found))
        return self._devices

    def _wants(self, device: Any) -> bool:
        is_gpu = bool(device.type & cl.device_type.GPU)
        return bool(device.available and device.compiler_available) and not (
            is_gpu and device.vendor_id in self._left_out
        )


class OpenClDevice(Device):
    """One OpenCL device; its blocks are ``pyopencl.Buffer``."""

    def __init__(self, index: int, device: Any) -> None:
        self._opencl = device
        with _translated(f"opencl:{index}"):
            self._context = cl.Context([device])
            # Profiling is what events tell the time by.
            self._queue = cl.CommandQueue(
                self._context, device, properties=cl.command_queue_properties.PROFILING_ENABLE
            )
        super().__init__(_info(index, device), _capabilities(device))

    def free_memory_bytes(self) -> int:
        """Return an estimate: OpenCL tells what there is, not what others use."""
        left = max(self.info.memory_bytes - self.allocated_bytes, 0)
        return min(left, free_memory_bytes()) if self.capabilities.host_cores else left

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done."""
        with _translated(self):
            self._queue.finish()

    def measure(self, work: Any) -> float:
        """Return the seconds between two marks in the queue, before and after what ``work`` queues."""
        self.synchronize()
        with _translated(self):
            start = cl.enqueue_marker(self._queue)
            work()
            end = cl.enqueue_marker(self._queue)
            end.wait()
            return float(end.profile.end - start.profile.end) * 1e-9

    def _allocate(self, nbytes: int) -> Native:
        try:
            block = cl.Buffer(self._context, cl.mem_flags.READ_WRITE, size=max(nbytes, 1))
            # Drivers put off allocating until the first use, which would fail somewhere else.
            cl.enqueue_migrate_mem_objects(self._queue, [block], flags=cl.mem_migration_flags.CONTENT_UNDEFINED)
        except cl.Error as error:
            if isinstance(error, cl.MemoryError) or error.code == _INVALID_BUFFER_SIZE:
                raise self.pool.out_of_memory(nbytes, str(error)) from error
            raise DeviceError(f"{self} cannot allocate {nbytes} bytes: {error}") from error
        return block

    def _free(self, native: Native) -> None:
        """Let it go with its last reference; OpenCL keeps it for as long as queued work needs it."""

    def _write(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        with _translated(self):
            cl.enqueue_copy(self._queue, native, array, dst_offset=offset_bytes, is_blocking=True)

    def _read(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        with _translated(self):
            cl.enqueue_copy(self._queue, array, native, src_offset=offset_bytes, is_blocking=True)

    def _clear(self, native: Native, nbytes: int) -> None:
        with _translated(self):
            cl.enqueue_fill_buffer(self._queue, native, np.zeros(1, dtype=np.uint8), 0, nbytes)

    def _copy_between(self, source: Device, native: Native, target: Device, to: Native, nbytes: int) -> bool:
        if source is not target:
            return False
        with _translated(self):
            cl.enqueue_copy(self._queue, to, native, byte_count=nbytes)
        return True

    def _compile(self, source: str, name: str, options: tuple[str, ...]) -> CompiledKernel:
        try:
            with warnings.catch_warnings():
                # Compilers talk; what matters is whether they fail.
                warnings.simplefilter("ignore")
                program = cl.Program(self._context, source).build(list(options), devices=[self._opencl])
            return _OpenClKernel(self, name, cl.Kernel(program, name), self._queue)
        except cl.Error as error:
            said = str(error)[: limits.COMPILER_OUTPUT_MAX_CHARS]
            raise CompileError(f"{self} ({self.name}) cannot compile kernel {name}: {said}") from error

    def _multiplier(self, product: Product) -> Callable[[Native, Native, Native], None]:
        kernel = self.compile(*opencl_source.matmul(product.dtype.name))
        shape_a, shape_b = product.shape_a, product.shape_b
        rows, depth, columns = shape_a[-2], shape_a[-1], shape_b[-1]
        run = kernel.bound(opencl_source.matmul_size(product.dtype.name, rows, columns), None)
        sizes = [np.uint64(size) for size in (rows, columns, depth)]
        starts = [list(map(np.uint64, ats)) for ats in batch_starts(shape_a, shape_b, product.shape)]

        def multiply(a: Native, b: Native, out: Native) -> None:
            for ats in starts:
                run([a, b, out, *sizes, *ats])

        return multiply


class _OpenClKernel(CompiledKernel):
    def __init__(self, device: OpenClDevice, name: str, kernel: Any, queue: Any) -> None:
        super().__init__(device, name)
        self._kernel = kernel
        self._queue = queue
        # Arguments are part of the kernel object until it is queued.
        self._lock = threading.Lock()

    def _launch(self, global_size: tuple[int, ...], local_size: tuple[int, ...] | None, arguments: list[Any]) -> None:
        if len(arguments) != self._kernel.num_args:
            raise UsageError(f"kernel {self.name} takes {self._kernel.num_args} arguments, not {len(arguments)}")
        with self._lock, _translated(f"kernel {self.name} on {self.device}"):
            for position, argument in enumerate(arguments):
                # OpenCL C has no parameters of type bool.
                value = np.uint8(argument) if isinstance(argument, np.bool_) else argument
                self._kernel.set_arg(position, value)
            cl.enqueue_nd_range_kernel(self._queue, self._kernel, global_size, local_size)
            # Drivers may hold it back for a fuller queue.
            self._queue.flush()


@contextmanager
def _translated(who: object) -> Iterator[None]:
    try:
        yield
    except cl.Error as error:
        raise DeviceError(f"{who}: OpenCL reports {error}") from error


def _platforms() -> list[Any]:
    try:
        return list(cl.get_platforms())
    except cl.Error as error:
        if error.code == _NO_PLATFORM:
            return []
        raise DeviceError(f"OpenCL's platforms cannot be listed: {error}") from error


def _devices_of(platform: Any) -> list[Any]:
    try:
        return list(platform.get_devices())
    except cl.Error as error:
        if error.code == _NO_DEVICE:
            return []
        raise DeviceError(f"the devices of OpenCL platform {platform.name} cannot be listed: {error}") from error


def _info(index: int, device: Any) -> DeviceInfo:
    features = [feature for feature in ("fp64", "fp16") if f"cl_khr_{feature}" in device.extensions.split()]
    return DeviceInfo(
        kind="opencl",
        index=index,
        name=device.name.strip()[: limits.NAME_MAX_CHARS],
        memory_bytes=device.global_mem_size,
        cores=device.max_compute_units,
        features=(device.version.split()[1] if " " in device.version else device.version, *features),
        driver=f"{device.platform.name} {device.driver_version}"[: limits.NAME_MAX_CHARS],
    )


def _capabilities(device: Any) -> DeviceCapabilities:
    extensions = device.extensions.split()
    floats = {"float32"}
    floats |= {"float64"} if "cl_khr_fp64" in extensions else set()
    floats |= {"float16"} if "cl_khr_fp16" in extensions else set()
    return DeviceCapabilities(
        dtypes=frozenset({"bool", *opencl_source.INTEGERS, *floats}),
        matmul_dtypes=frozenset({*opencl_source.INTEGERS, *floats}),
        language="opencl",
        host_cores=device.max_compute_units if device.type & cl.device_type.CPU else 0,
        unified=bool(device.host_unified_memory),
        local_size_max=device.max_work_group_size,
        allocation_max_bytes=device.max_mem_alloc_size,
    )
