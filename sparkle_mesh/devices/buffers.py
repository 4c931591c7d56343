"""Typed, one-dimensional pieces of a device's memory, counted by who holds them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sparkle_mesh.devices import transfers
from sparkle_mesh.devices.device import Device, Memory
from sparkle_mesh.devices.pool import whole_bytes
from sparkle_mesh.errors import ReleasedError, UsageError


class Buffer:
    """``size`` elements of one dtype on one device, from its pool; they hold anything until they are written.

    Whoever keeps a buffer beside the one who made it calls :meth:`retain`, and :meth:`release` when done with it. At
    the last release, at the end of a ``with`` block, or when it is garbage, its memory goes back to the pool. Arrays
    that share its memory (:meth:`view`, ``numpy.asarray`` on the CPU, DLPack) hold it, too. Safe to use from any
    thread; two that write the same elements at once get one or the other.

    Parameters
    ----------
    size
        In elements.
    dtype
        Any NumPy dtype of a fixed size, in this machine's byte order, without Python objects.
    device
        Where it is.

    Raises
    ------
    OutOfMemoryError
        If the device has too little free memory.
    UsageError
        If size or dtype are none of these.
    """

    def __init__(self, size: int, dtype: npt.DTypeLike, device: Device) -> None:
        self._memory: Memory | None = None
        self._lock = threading.Lock()
        self._references = 1
        self._size = whole_bytes(size)
        self._dtype = plain_dtype(dtype)
        self._device = device
        self._memory = device.pool.allocate(self.nbytes)

    @property
    def size(self) -> int:
        """How many elements."""
        return self._size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of each element."""
        return self._dtype

    @property
    def device(self) -> Device:
        """Where it is."""
        return self._device

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._size * self._dtype.itemsize

    @property
    def memory(self) -> Memory:
        """The block that it lies in, at the start; it may be larger.

        Raises
        ------
        ReleasedError
            If the buffer was released.
        """
        memory = self._memory
        if memory is None:
            raise self._released()
        return memory

    @property
    def is_released(self) -> bool:
        """Whether its memory went back to the pool."""
        return self._memory is None

    # --- Who holds it --------------------------------------------------------------------------

    def retain(self) -> Buffer:
        """Hold it once more; returns it.

        Raises
        ------
        ReleasedError
            If it was released.
        """
        with self._lock:
            if self._memory is None:
                raise self._released()
            self._references += 1
        return self

    def release(self) -> None:
        """Let go of it once; the last one gives the memory back.

        Raises
        ------
        ReleasedError
            If everybody had let go before.
        """
        with self._lock:
            if self._memory is None:
                raise self._released()
            self._references -= 1
            if self._references:
                return
            memory, self._memory = self._memory, None
        self._device.pool.free(memory)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self._device.pool.free(memory)

    def __reduce__(self) -> NoReturn:
        raise UsageError("a Buffer cannot be copied by `copy` or pickled; make another and call copy_from")

    # --- What is in it -------------------------------------------------------------------------

    def copy_from(self, source: npt.NDArray[Any] | Buffer) -> Buffer:
        """Overwrite all elements with those of ``source``; returns this buffer.

        Parameters
        ----------
        source
            A NumPy array of any shape and strides, or a buffer on any device; of the same dtype and size. An array
            may be changed as soon as this returns.

        Raises
        ------
        UsageError
            If it differs in dtype or size.
        ReleasedError
            If one of the two was released.
        """
        if isinstance(source, Buffer):
            source.copy_to(self)
            return self
        self._check(source, "source")
        with self._held() as memory:
            self._device.copy_from_host(memory, np.ascontiguousarray(source))
        return self

    def copy_to(self, target: npt.NDArray[Any] | Buffer) -> None:
        """Overwrite ``target`` with all elements; see :meth:`copy_from`.

        Raises
        ------
        UsageError
            If it differs in dtype or size, or is a read-only array.
        ReleasedError
            If one of the two was released.
        """
        self._check(target, "target")
        if isinstance(target, Buffer):
            with self._held() as memory, target._held() as other:
                transfers.copy(memory, other, self.nbytes)
            return
        if not target.flags.writeable:
            raise UsageError("the target array is read-only; pass one that may be written")
        with self._held() as memory:
            if target.flags.c_contiguous:
                self._device.copy_to_host(memory, target)
            else:
                dense = np.empty(target.shape, dtype=self._dtype)
                self._device.copy_to_host(memory, dense)
                target[...] = dense

    def view(self) -> Any:
        """Return the elements as an array of the device's own library (NumPy, CuPy) that shares the memory.

        Raises
        ------
        UsageError
            If the device has no such arrays.
        ReleasedError
            If it was released.
        """
        with self._held() as memory:
            return self._device.view(memory, self._dtype, self._size, _Hold(self))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        wanted = self._dtype if dtype is None else np.dtype(dtype)
        shares = self._device.capabilities.memory_is_host
        if copy is False and not (shares and wanted == self._dtype):
            # What NumPy's protocol asks for where a copy is needed and forbidden.
            raise ValueError(f"an array of {wanted} cannot share memory with {self!r}")
        if shares and not copy:
            view: npt.NDArray[Any] = self.view()
            return view.astype(wanted, copy=False)
        array = np.empty(self._size, dtype=self._dtype)
        self.copy_to(array)
        return array.astype(wanted, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        """Return a DLPack capsule that shares the memory, on the CPU, CUDA and ROCm.

        Raises
        ------
        BufferError
            If the device or dtype cannot be told in DLPack.
        """
        self.__dlpack_device__()
        return self.view().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return type and number of the device, as DLPack counts them.

        Raises
        ------
        BufferError
            If the device cannot be told in DLPack.
        """
        device = self._device.dlpack_device()
        if device is None:
            raise BufferError(f"{self._device} cannot show its memory through DLPack; copy to the host first")
        return device

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        released = ", released" if self.is_released else ""
        return f"<Buffer of {self._size} {self._dtype} on {self._device}{released}>"

    def _check(self, other: npt.NDArray[Any] | Buffer, what: str) -> None:
        if not isinstance(other, (np.ndarray, Buffer)):
            raise UsageError(f"{what} is {type(other).__name__}; pass a NumPy array or a Buffer")
        if other.dtype != self._dtype:
            raise UsageError(
                f"{what} holds {other.dtype}, this buffer {self._dtype};"
                f" convert first: array.astype({str(self._dtype)!r})"
            )
        if other.size != self._size:
            raise UsageError(f"{what} has {other.size} elements, this buffer {self._size}; pass one of the same size")

    @contextmanager
    def _held(self) -> Iterator[Memory]:
        """Hold it for a while, so that another thread's release does not take the memory away in the midst."""
        self.retain()
        try:
            yield self.memory
        finally:
            self.release()

    def _released(self) -> ReleasedError:
        return ReleasedError(f"this buffer of {self._size} {self._dtype} on {self._device} was released; make another")


class _Hold:
    """Holds a buffer for as long as it lives itself: what an array over the buffer's memory keeps."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer.retain()

    def __del__(self) -> None:
        buffer = getattr(self, "_buffer", None)
        if buffer is not None and not buffer.is_released:
            buffer.release()


def plain_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return ``dtype`` as one that device memory can hold.

    Raises
    ------
    UsageError
        If it holds Python objects, has no size, or is in the other byte order.
    """
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise UsageError(f"dtype is {dtype!r}, which NumPy does not know: {error}") from error
    if kind.hasobject or not kind.itemsize:
        raise UsageError(f"dtype {kind} cannot lie in a device's memory; choose one of a fixed size, as float32")
    if not kind.isnative:
        native = kind.newbyteorder("=").str
        raise UsageError(f"dtype {kind} is in the other byte order; convert first: array.astype({native!r})")
    return kind
