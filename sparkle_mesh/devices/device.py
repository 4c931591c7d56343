"""What every compute device offers, whatever it is made of.

A :class:`Device` has :class:`Memory`: blocks of raw bytes, in which arrays lie dense and begin at the start. All
work on one device happens in the order in which it was asked for, whichever thread asked: a block can be freed, and
handed out again, while kernels that read it are still queued. Host arrays are read and written before a call returns.

A backend adapts one library: it fills in the methods that begin with an underscore, which are called with checked
arguments, from any thread.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.devices.host_bytes import host_bytes
from sparkle_mesh.devices.pool import MemoryPool, whole_bytes
from sparkle_mesh.devices.products import Product, checked_product
from sparkle_mesh.errors import DeviceError, ReleasedError, UsageError

if TYPE_CHECKING:
    from sparkle_mesh.devices.compiled import CompiledKernel

#: What a backend's library hands out for a block: a NumPy or CuPy array of bytes, an OpenCL buffer.
Native: TypeAlias = Any
Shape: TypeAlias = Sequence[int]


@dataclass(frozen=True, slots=True)
class DeviceCapabilities:
    """What one device can do.

    Attributes
    ----------
    dtypes
        Names of the NumPy dtypes that it computes with.
    matmul_dtypes
        Names of those that :meth:`Device.matmul` multiplies.
    matmul_transposes
        Whether it takes factors whose last two axes are exchanged in memory.
    language
        What :meth:`Device.compile` takes: ``"cuda"`` (CUDA C++, HIP on ROCm), ``"opencl"`` (OpenCL C), or ``""`` where
        nothing is compiled.
    memory_is_host
        Whether a block's ``native`` is a NumPy array.
    host_cores
        With how many of the host's processor cores it computes, as the CPU device does: devices that together have
        more than there are slow each other down.
    keeps_nothing
        Whether it stands for memory alone: what is computed there, or read from it, means nothing.
    unified
        Whether its memory is the host's, so that copies cross no bus.
    local_size_max
        Most work items (threads) of one group (block); 0 where nothing is compiled.
    allocation_max_bytes
        Largest block.
    """

    dtypes: frozenset[str]
    matmul_dtypes: frozenset[str] = frozenset()
    matmul_transposes: bool = False
    language: Literal["", "cuda", "opencl"] = ""
    memory_is_host: bool = False
    host_cores: int = 0
    keeps_nothing: bool = False
    unified: bool = False
    local_size_max: int = 0
    allocation_max_bytes: int = 2**63 - 1


class Memory:
    """A block of ``nbytes`` raw bytes on ``device``; made by :meth:`Device.allocate`."""

    __slots__ = ("__weakref__", "_natives", "device", "nbytes")

    def __init__(self, device: Device, nbytes: int, native: Native) -> None:
        self.device = device
        self.nbytes = nbytes
        # Empty when freed: of two threads, or a thread and a finalizer in its midst, only one can take it out.
        self._natives = [native]

    @property
    def freed(self) -> bool:
        """Whether the block was given back."""
        return not self._natives

    @property
    def native(self) -> Native:
        """The block as the backend's library knows it.

        A NumPy array of bytes, aligned to 64 (CPU), a CuPy array of bytes, a ``pyopencl.Buffer`` (of one byte if
        ``nbytes`` is 0), or None (null).

        Raises
        ------
        ReleasedError
            If the block was freed.
        """
        try:
            return self._natives[0]
        except IndexError:
            raise self._released() from None

    def _take(self) -> Native:
        try:
            return self._natives.pop()
        except IndexError:
            raise self._released() from None

    def _released(self) -> ReleasedError:
        return ReleasedError(f"this block of {self.nbytes} bytes on {self.device} was freed; allocate another")

    def __repr__(self) -> str:
        return f"<Memory of {self.nbytes} bytes on {self.device}{', freed' if self.freed else ''}>"


class Device(ABC):
    """One compute device; safe to use from any thread.

    Attributes
    ----------
    info
        What it is.
    capabilities
        What it can do.
    pool
        Blocks of its memory that are kept for the next use; buffers and arrays take theirs from there.
    """

    def __init__(self, info: DeviceInfo, capabilities: DeviceCapabilities, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.info = info
        self.capabilities = capabilities
        self.pool = MemoryPool(self)
        self._clock = clock
        # Changes of what is allocated, which come from finalizers too: whoever reads the sum adds them up.
        self._changes: deque[int] = deque()
        self._changes_lock = threading.Lock()
        self._compile_lock = threading.Lock()
        self._kernels: OrderedDict[tuple[str, str, tuple[str, ...]], CompiledKernel] = OrderedDict()
        self._allocated_bytes = 0

    @property
    def kind(self) -> str:
        """``"cpu"``, ``"cuda"``, ``"rocm"``, ``"opencl"``, ``"null"``, or what another package calls its devices."""
        return self.info.kind

    @property
    def index(self) -> int:
        """Counts the devices of one kind from 0."""
        return self.info.index

    @property
    def name(self) -> str:
        """What its maker calls it."""
        return self.info.name

    @property
    def allocated_bytes(self) -> int:
        """What of its memory this process holds through :meth:`allocate`, pooled blocks included."""
        with self._changes_lock:
            self._add_up()
            return self._allocated_bytes

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"

    def __repr__(self) -> str:
        return f"<Device {self} ({self.name})>"

    # --- Memory --------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Memory:
        """Return a new block of ``nbytes`` bytes, which hold anything.

        Prefer ``pool.allocate``, which reuses freed blocks.

        Raises
        ------
        OutOfMemoryError
            If the device has no such block.
        UsageError
            If ``nbytes`` is no size.
        """
        size = whole_bytes(nbytes)
        if size > self.capabilities.allocation_max_bytes:
            raise self.pool.out_of_memory(size, f"its largest block has {self.capabilities.allocation_max_bytes}")
        memory = Memory(self, size, self._allocate(size))
        self._count(size)
        return memory

    def free(self, memory: Memory) -> None:
        """Give a block back to the device's library. Freeing twice is an error.

        Raises
        ------
        ReleasedError
            If it was freed before.
        """
        self.native_of(memory)
        self._free(memory._take())
        self._count(-memory.nbytes)

    def native_of(self, memory: Memory) -> Native:
        """Return ``memory.native``, if the block is one of this device.

        Raises
        ------
        UsageError
            If it is another device's.
        ReleasedError
            If it was freed.
        """
        if memory.device is not self:
            raise UsageError(f"{memory!r} is not a block of {self}; copy it there first")
        return memory.native

    def copy_from_host(self, memory: Memory, array: npt.NDArray[Any], offset_bytes: int = 0) -> None:
        """Write all of ``array`` (C-contiguous) into the block, ``offset_bytes`` from its start.

        ``array`` may be changed as soon as this returns.

        Raises
        ------
        UsageError
            If the array is not contiguous, or does not fit.
        """
        view = host_bytes(array)
        native = self._range(memory, offset_bytes, view.size)
        if view.size:
            self._write(native, view, offset_bytes)

    def copy_to_host(self, memory: Memory, array: npt.NDArray[Any], offset_bytes: int = 0) -> None:
        """Fill ``array`` (C-contiguous) from the block, from ``offset_bytes`` on. Waits for what is queued before.

        Raises
        ------
        UsageError
            If the array is not contiguous, is read-only, or asks for more than there is.
        """
        if not array.flags.writeable:
            raise UsageError("the array to copy to is read-only; pass one that may be written")
        view = host_bytes(array)
        native = self._range(memory, offset_bytes, view.size)
        if view.size:
            self._read(native, view, offset_bytes)

    def copy_between(self, source: Memory, target: Memory, nbytes: int | None = None) -> bool:
        """Copy the first ``nbytes`` (by default, all of ``source``) to ``target``, on this device or one of its kind.

        Ordered after what is queued on both devices, and before what is queued later.

        Returns
        -------
        bool
            False if the hardware has no direct way: nothing was copied then (see :func:`.transfers.copy`).

        Raises
        ------
        UsageError
            If neither block is on this device, or they do not hold ``nbytes``.
        """
        count = source.nbytes if nbytes is None else nbytes
        if self is not source.device and self is not target.device:
            raise UsageError(f"neither {source!r} nor {target!r} is on {self}; ask one of their devices")
        from_native = source.device._range(source, 0, count)
        to_native = target.device._range(target, 0, count)
        if source.device.kind != target.device.kind:
            return False
        if count == 0 or source is target:
            return True
        return self._copy_between(source.device, from_native, target.device, to_native, count)

    def clear(self, memory: Memory, nbytes: int | None = None) -> None:
        """Set the first ``nbytes`` of the block (by default, all) to zero."""
        count = memory.nbytes if nbytes is None else nbytes
        native = self._range(memory, 0, count)
        if count:
            self._clear(native, count)

    def view(self, memory: Memory, dtype: npt.DTypeLike, count: int, owner: object) -> Any:
        """Return the block's first ``count`` elements as an array of the library's own, without a copy.

        The array keeps ``owner`` alive.

        Raises
        ------
        UsageError
            If this device's library has no such arrays (OpenCL, null), or the block is too small.
        """
        kind = np.dtype(dtype)
        native = self._range(memory, 0, count * kind.itemsize)
        return self._view(native, kind, count, owner)

    def dlpack_device(self) -> tuple[int, int] | None:
        """Return the device as DLPack numbers it; None if its memory cannot be shown through DLPack."""
        return None

    @abstractmethod
    def free_memory_bytes(self) -> int:
        """Return how much of the device's memory nobody uses now; for some devices an estimate."""

    # --- Work ----------------------------------------------------------------------------------

    def compile(self, source: str, name: str, options: Sequence[str] = ()) -> CompiledKernel:
        """Return kernel ``name`` of ``source``, compiled once per source, name and options.

        Raises
        ------
        CompileError
            If the compiler refused it.
        UsageError
            If the device compiles nothing.
        """
        if not self.capabilities.language:
            raise UsageError(f"{self} compiles no kernels; choose a cuda, rocm or opencl device")
        key = (source, name, tuple(options))
        with self._compile_lock:
            kernel = self._kernels.get(key)
            if kernel is not None:
                self._kernels.move_to_end(key)
                return kernel
        # Others go on meanwhile. Of two threads that compile the same, one does so for nothing.
        compiled = self._compile(*key)
        with self._compile_lock:
            kernel = self._kernels.setdefault(key, compiled)
            while len(self._kernels) > limits.COMPILED_KERNELS_MAX_COUNT:
                self._kernels.popitem(last=False)
        return kernel

    def matmul(
        self,
        a: Memory,
        b: Memory,
        out: Memory,
        shape_a: Shape,
        shape_b: Shape,
        dtype: npt.DTypeLike,
        *,
        transposed: tuple[bool, bool] = (False, False),
    ) -> None:
        """Queue ``out = a @ b``, as :func:`numpy.matmul` defines it, of dense arrays of one dtype.

        Parameters
        ----------
        shape_a, shape_b
            ``(..., m, k)`` and ``(..., k, n)``, of two dimensions or more; leading ones broadcast. ``out`` is
            ``(..., m, n)`` and shares no memory with the others.
        transposed
            Whether a, and b, lie in memory with their last two axes exchanged; needs ``matmul_transposes``.

        Raises
        ------
        UsageError
            If the shapes do not fit each other, the dtype, or the blocks, or this device takes no such factors.
        """
        if out is a or out is b:
            raise UsageError("out is one of the factors; give it a block of its own")
        product = self._product(shape_a, shape_b, dtype, transposed)
        ranges = zip((a, b, out), product.nbytes, strict=True)
        natives = [self._range(memory, 0, nbytes) for memory, nbytes in ranges]
        self._bound_product(product)(natives[0], natives[1], natives[2])

    def bound_matmul(
        self, shape_a: Shape, shape_b: Shape, dtype: npt.DTypeLike, *, transposed: tuple[bool, bool] = (False, False)
    ) -> Callable[[Native, Native, Native], None]:
        """Return what queues such a product, as :meth:`matmul`: for products that are made again and again.

        It takes blocks as the backend's library knows them (``memory.native``), unchecked.
        """
        return self._bound_product(self._product(shape_a, shape_b, dtype, transposed))

    def _product(self, shape_a: Shape, shape_b: Shape, dtype: npt.DTypeLike, transposed: tuple[bool, bool]) -> Product:
        can = self.capabilities
        if any(transposed) and not can.matmul_transposes:
            raise UsageError(f"{self} multiplies no matrices that lie transposed; copy them to their own order first")
        return checked_product(
            str(self), can.matmul_dtypes, tuple(shape_a), tuple(shape_b), np.dtype(dtype), transposed
        )

    def _bound_product(self, product: Product) -> Callable[[Native, Native, Native], None]:
        if product.is_empty:
            return lambda a, b, out: None
        if product.is_zero:
            return lambda a, b, out: self._clear(out, product.nbytes[2])
        return self._multiplier(product)

    def measure(self, work: Callable[[], object]) -> float:
        """Return the seconds that the device takes for what ``work`` queues, by its own clock where it has one.

        Waits before and after; call it from one thread at a time, with nobody else's work on the device.
        """
        self.synchronize()
        started = self._clock.now()
        work()
        self.synchronize()
        return self._clock.now() - started

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done.

        Raises
        ------
        DeviceError
            If something that was queued has failed.
        """

    def close(self) -> None:
        """Give back what the device keeps: pooled blocks and compiled kernels. It may be used again."""
        self.pool.empty()
        with self._compile_lock:
            self._kernels.clear()

    # --- For backends to fill in ---------------------------------------------------------------

    @abstractmethod
    def _allocate(self, nbytes: int) -> Native: ...

    @abstractmethod
    def _free(self, native: Native) -> None: ...

    @abstractmethod
    def _write(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None: ...

    @abstractmethod
    def _read(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None: ...

    @abstractmethod
    def _clear(self, native: Native, nbytes: int) -> None: ...

    @abstractmethod
    def _copy_between(self, source: Device, native: Native, target: Device, to: Native, nbytes: int) -> bool: ...

    def _view(self, native: Native, dtype: np.dtype[Any], count: int, owner: object) -> Any:
        raise UsageError(f"{self} has no arrays that share its memory; copy to the host first")

    def _compile(self, source: str, name: str, options: tuple[str, ...]) -> CompiledKernel:
        raise DeviceError(f"the backend of {self} says that it compiles {self.capabilities.language}, and does not")

    def _multiplier(self, product: Product) -> Callable[[Native, Native, Native], None]:
        """Return what queues ``out = a @ b``; there is something to multiply, and to sum over."""
        raise DeviceError(f"the backend of {self} says that it multiplies {product.dtype}, and does not")

    def _count(self, change: int) -> None:
        self._changes.append(change)
        if self._changes_lock.acquire(blocking=False):
            try:
                self._add_up()
            finally:
                self._changes_lock.release()

    def _add_up(self) -> None:
        while self._changes:
            self._allocated_bytes += self._changes.popleft()

    def _range(self, memory: Memory, offset_bytes: int, nbytes: int) -> Native:
        native = self.native_of(memory)
        if offset_bytes < 0 or nbytes < 0 or offset_bytes + nbytes > memory.nbytes:
            raise UsageError(f"bytes {offset_bytes} to {offset_bytes + nbytes} are not within {memory!r}")
        return native


class Backend(ABC):
    """A library that gives access to devices of one kind, or several.

    A package registers its own under the entry-point group ``sparkle_mesh.backends``: a class, or a function, that
    takes no arguments and returns one.
    """

    @property
    @abstractmethod
    def kind(self) -> str:
        """The kind of its devices."""

    @abstractmethod
    def devices(self) -> tuple[Device, ...]:
        """Return its devices, by index; none where there is no hardware. The same objects each time.

        Raises
        ------
        DeviceError
            If the driver is there, and broken.
        """
