"""NVIDIA and AMD GPUs through CuPy, which among devices this file and :mod:`.cupy_products` import.

All work of a device goes into its null stream, which orders it with whatever else the process does with the GPU (but
for streams that ask not to be). Blocks come from the driver itself, not from CuPy's own pool: ours sees all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.devices.compiled import CompiledKernel
from sparkle_mesh.devices.cpu import NUMERIC_DTYPES
from sparkle_mesh.devices.cupy_products import multiplier
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.devices.device import Backend, Device, DeviceCapabilities, Native
from sparkle_mesh.devices.products import Product
from sparkle_mesh.devices.staging import Staging
from sparkle_mesh.errors import CompileError, DeviceError, UsageError

_runtime = cupy.cuda.runtime
KIND = "rocm" if _runtime.is_hip else "cuda"
_DLPACK_TYPE = 10 if _runtime.is_hip else 2
# cudaError_t, hipError_t: the same numbers.
_OUT_OF_MEMORY = 2
_NO_DEVICE = (35, 100)  # driver too old or absent, no GPU
_PEER_ACCESS_ENABLED = 704
# Threads of a block where the caller does not say, by the number of dimensions.
_GROUPS = {1: (256,), 2: (32, 8), 3: (32, 4, 2)}
_ERRORS = (_runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError, cupy.cuda.memory.OutOfMemoryError)


class CupyBackend(Backend):
    """Finds the GPUs that the CUDA (or ROCm) runtime shows to this process."""

    def __init__(self) -> None:
        self._devices: tuple[Device, ...] | None = None

    @property
    def kind(self) -> str:
        """The kind of its devices: ``"cuda"``, or ``"rocm"`` where CuPy was built for AMD's."""
        return KIND

    def devices(self) -> tuple[Device, ...]:
        """Return the GPUs, in the runtime's order."""
        if self._devices is None:
            try:
                count = _runtime.getDeviceCount()
            except _runtime.CUDARuntimeError as error:
                if error.status not in _NO_DEVICE:
                    raise DeviceError(f"the {KIND} devices cannot be listed: {error}") from error
                count = 0
            self._devices = tuple(CupyDevice(index) for index in range(count))
        return self._devices


class CupyDevice(Device):
    """One GPU; its blocks are CuPy arrays of bytes."""

    def __init__(self, index: int) -> None:
        with _translated(f"{KIND}:{index}"):
            properties = _runtime.getDeviceProperties(index)
            driver = _runtime.driverGetVersion()
        name = properties["name"].decode(errors="replace")[: limits.NAME_MAX_CHARS]
        architecture = properties.get("gcnArchName", b"").decode(errors="replace")
        feature = architecture or f"sm_{properties['major']}{properties['minor']}"
        info = DeviceInfo(
            kind=KIND,
            index=index,
            name=name,
            memory_bytes=properties["totalGlobalMem"],
            features=(feature[: limits.NAME_MAX_CHARS],),
            driver=str(driver),
        )
        capabilities = DeviceCapabilities(
            dtypes=NUMERIC_DTYPES,
            matmul_dtypes=NUMERIC_DTYPES - {"bool"},
            matmul_transposes=True,
            language="cuda",
            unified=bool(properties.get("integrated", 0)),
            local_size_max=properties["maxThreadsPerBlock"],
        )
        super().__init__(info, capabilities)
        self._staging = Staging(self)
        self._peers: dict[int, bool] = {}
        self._peers_lock = threading.Lock()

    def free_memory_bytes(self) -> int:
        """Return what the driver says is free, for all programs together."""
        with self.activated():
            return int(_runtime.memGetInfo()[0])

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done."""
        with self.activated():
            _runtime.deviceSynchronize()

    def measure(self, work: Callable[[], object]) -> float:
        """Return the seconds between two events, before and after what ``work`` queues."""
        with self.activated():
            _runtime.deviceSynchronize()
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(cupy.cuda.Stream.null)
            work()
            end.record(cupy.cuda.Stream.null)
            end.synchronize()
            return float(cupy.cuda.get_elapsed_time(start, end)) / 1000

    def dlpack_device(self) -> tuple[int, int]:
        """Return the device as DLPack numbers it."""
        return (_DLPACK_TYPE, self.index)

    def close(self) -> None:
        """Give back what the device keeps, its pinned blocks included."""
        super().close()
        self._staging.close()

    # --- What staging needs --------------------------------------------------------------------

    def activated(self) -> _Activated:
        """Make this the calling thread's device, and its null stream the current one; translate errors."""
        return _Activated(self)

    def pin(self, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """Return pinned host memory; None if there is none to have."""
        try:
            # Not from CuPy's pool, which would keep it for good.
            block = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(nbytes), 0)
        except (_runtime.CUDARuntimeError, MemoryError):
            return None
        return np.frombuffer(block, dtype=np.uint8, count=nbytes)

    def start_write(self, native: Native, offset_bytes: int, host: npt.NDArray[np.uint8]) -> Any:
        """Queue a copy to the device."""
        pointer = native.data.ptr + offset_bytes
        _runtime.memcpyAsync(pointer, host.ctypes.data, host.size, _runtime.memcpyHostToDevice, 0)
        return _mark()

    def start_read(self, native: Native, offset_bytes: int, host: npt.NDArray[np.uint8]) -> Any:
        """Queue a copy from the device."""
        pointer = native.data.ptr + offset_bytes
        _runtime.memcpyAsync(host.ctypes.data, pointer, host.size, _runtime.memcpyDeviceToHost, 0)
        return _mark()

    # --- Memory --------------------------------------------------------------------------------

    def _allocate(self, nbytes: int) -> Native:
        try:
            return self._ask_driver(nbytes)
        except _ERRORS as error:
            if not _is_out_of_memory(error):
                raise DeviceError(f"{self} cannot allocate {nbytes} bytes: {error}") from error
        # What CuPy itself keeps for its next use counts as free.
        with self.activated():
            cupy.get_default_memory_pool().free_all_blocks()
        try:
            return self._ask_driver(nbytes)
        except _ERRORS as error:
            raise self.pool.out_of_memory(nbytes, str(error)) from error

    def _ask_driver(self, nbytes: int) -> Native:
        with cupy.cuda.Device(self.index):
            block = cupy.cuda.memory.Memory(max(nbytes, 1))
            return cupy.ndarray((nbytes,), dtype=np.uint8, memptr=cupy.cuda.MemoryPointer(block, 0))

    def _free(self, native: Native) -> None:
        """Let it go with its last reference, when the driver waits for what is queued."""

    def _write(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        if self._goes_directly(array):
            with self.activated():
                self.start_write(native, offset_bytes, array).synchronize()
        else:
            self._staging.write(native, array, offset_bytes)

    def _read(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        if self._goes_directly(array):
            with self.activated():
                self.start_read(native, offset_bytes, array).synchronize()
        else:
            self._staging.read(native, array, offset_bytes)

    def _goes_directly(self, array: npt.NDArray[np.uint8]) -> bool:
        """Return whether a host array is small, or lies in pinned memory, which the bus reads as it is."""
        if array.size < limits.STAGED_COPY_MIN_BYTES:
            return True
        try:
            with cupy.cuda.Device(self.index):
                return bool(_runtime.pointerGetAttributes(array.ctypes.data).type == _runtime.memoryTypeHost)
        except _runtime.CUDARuntimeError:
            # Older ROCm calls ordinary memory an invalid value.
            return False

    def _clear(self, native: Native, nbytes: int) -> None:
        with self.activated():
            _runtime.memsetAsync(native.data.ptr, 0, nbytes, 0)

    def _copy_between(self, source: Device, native: Native, target: Device, to: Native, nbytes: int) -> bool:
        assert isinstance(source, CupyDevice)
        assert isinstance(target, CupyDevice)
        if source is target:
            with self.activated():
                _runtime.memcpyAsync(to.data.ptr, native.data.ptr, nbytes, _runtime.memcpyDeviceToDevice, 0)
            return True
        if not target.reaches(source):
            return False
        # Each GPU has its own null stream: the target's waits for the source's, and the other way round.
        with source.activated():
            written = _mark()
        with target.activated():
            cupy.cuda.Stream.null.wait_event(written)
            _runtime.memcpyPeerAsync(to.data.ptr, target.index, native.data.ptr, source.index, nbytes, 0)
            copied = _mark()
        with source.activated():
            cupy.cuda.Stream.null.wait_event(copied)
        return True

    def reaches(self, other: CupyDevice) -> bool:
        """Return whether this GPU reads the other's memory over NVLink or PCI, and let it."""
        with self._peers_lock:
            if other.index not in self._peers:
                with self.activated():
                    can = bool(_runtime.deviceCanAccessPeer(self.index, other.index))
                    if can:
                        _enable_peer_access(other.index)
                    self._peers[other.index] = can
            return self._peers[other.index]

    def _view(self, native: Native, dtype: np.dtype[Any], count: int, owner: object) -> Any:
        with self.activated():
            # It keeps the block, too: the owner may let go of it, and the driver must not.
            block = cupy.cuda.UnownedMemory(native.data.ptr, max(native.size, 1), (native, owner), self.index)
            return cupy.ndarray((count,), dtype=dtype, memptr=cupy.cuda.MemoryPointer(block, 0))

    # --- Work ----------------------------------------------------------------------------------

    def _compile(self, source: str, name: str, options: tuple[str, ...]) -> CompiledKernel:
        try:
            with cupy.cuda.Device(self.index):
                module = cupy.RawModule(code=source, options=options)
                return _CupyKernel(self, name, module.get_function(name), module)
        except (cupy.cuda.compiler.CompileException, *_ERRORS) as error:
            said = str(error)[: limits.COMPILER_OUTPUT_MAX_CHARS]
            raise CompileError(f"{self} ({self.name}) cannot compile kernel {name}: {said}") from error

    def _multiplier(self, product: Product) -> Callable[[Native, Native, Native], None]:
        return multiplier(product, self.activated)


class _Activated:
    """While it is open a GPU is the thread's device, and its null stream the current one.

    Most often they are: to look is several times as fast as to set them.
    """

    __slots__ = ("_device", "_set")

    def __init__(self, device: CupyDevice) -> None:
        self._device = device
        self._set: ExitStack | None = None

    def __enter__(self) -> None:
        try:
            if _runtime.getDevice() == self._device.index and not cupy.cuda.get_current_stream().ptr:
                return
            with ExitStack() as stack:
                stack.enter_context(cupy.cuda.Device(self._device.index))
                stack.enter_context(cupy.cuda.Stream.null)
                self._set = stack.pop_all()
        except _ERRORS as error:
            raise self._told(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._set is not None:
            self._set.close()
        if isinstance(error, _ERRORS):
            raise self._told(error) from error

    def _told(self, error: BaseException) -> DeviceError:
        return DeviceError(f"{self._device}: the driver reports {error}")


class _CupyKernel(CompiledKernel):
    def __init__(self, device: CupyDevice, name: str, function: Any, module: Any) -> None:
        super().__init__(device, name)
        self._gpu = device
        self._function = function
        # The function lives in it.
        self._module = module

    def _launch(self, global_size: tuple[int, ...], local_size: tuple[int, ...] | None, arguments: list[Any]) -> None:
        group = local_size or _GROUPS[len(global_size)]
        grid = tuple(-(-size // threads) for size, threads in zip(global_size, group, strict=True))
        try:
            with self._gpu.activated():
                self._function(grid, group, tuple(arguments))
        except (TypeError, ValueError) as error:
            raise UsageError(f"kernel {self.name} on {self.device} does not take these arguments: {error}") from error


@contextmanager
def _translated(who: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise DeviceError(f"{who}: the driver reports {error}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "status", None) == _OUT_OF_MEMORY


def _mark() -> Any:
    """Return an event at this point of the current device's null stream."""
    event = cupy.cuda.Event(disable_timing=True)
    event.record(cupy.cuda.Stream.null)
    return event


def _enable_peer_access(peer: int) -> None:
    try:
        _runtime.deviceEnablePeerAccess(peer)
    except _runtime.CUDARuntimeError as error:
        if error.status != _PEER_ACCESS_ENABLED:
            raise
