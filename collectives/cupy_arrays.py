"""Arrays of GPUs in pinned memory of the host, where they are reduced: CuPy's own, and others' by DLPack.

CuPy copies them; it is imported when the first array of a GPU comes. The arrays of one call lie in one block of pinned
memory, which is kept for the next call: what is pinned is copied at the full rate of the bus, and by the GPU alone.

Copies are made in the current stream of the calling thread, after all that was put into it before. Another library's
array is exported to that stream, which then waits for the stream of that library. All copies have ended when a function
here returns: no stream, of whichever library, sees what was there before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import Any

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.dlpack import ROCM, device_of, export, memory_at, type_name
from sparkle_mesh.collectives.executor import BufferPool
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import DeviceError, UsageError

_lock = Lock()


def _pin(nbytes: int) -> Array:
    """Return new bytes of pinned memory."""
    if not nbytes:
        return np.empty(0, np.uint8)
    # Not by CuPy's pool, which never lets go of any.
    pinned = importlib.import_module("cupy").cuda.PinnedMemory(nbytes)
    return np.frombuffer(memory_at(pinned.ptr, nbytes, pinned), np.uint8)


_pool = BufferPool(_pin, limits.PINNED_BUFFERS_POOLED_MAX_BYTES)


class OnGpus:
    """The arrays of GPUs of one call.

    Parameters
    ----------
    values
        Each array, and what to call it.
    read, written
        Whether to fetch what they hold, and whether it may be overwritten.

    Attributes
    ----------
    hosts
        Their places in pinned memory: NumPy arrays of the same shapes and dtypes.

    Raises
    ------
    UsageError
        If CuPy is not installed, or cannot read one.
    """

    def __init__(self, values: Sequence[tuple[Any, str]], *, read: bool, written: bool) -> None:
        self._cupy, self._what = _load(*values[0]), values[0][1]
        arrays = [self._device_array(value, what, written) for value, what in values]
        self._arrays = [array for array, _ in arrays]
        starts, end = [], 0
        for array in self._arrays:
            starts.append(end)
            end += -(-array.nbytes // limits.PINNED_ALIGNMENT_BYTES) * limits.PINNED_ALIGNMENT_BYTES
        self._block: Array | None = None
        try:
            with _lock:
                self._block = _pool.take(end, np.dtype(np.uint8))
            self.hosts = [
                self._block[start : start + array.nbytes].view(dtype).reshape(array.shape)
                for start, (array, dtype) in zip(starts, arrays, strict=True)
            ]
            if read:
                self._copy(self._fetch)
        except _errors(self._cupy) as error:
            self.give_back()
            raise UsageError(f"{self._what} cannot be copied from its GPU: {error}") from error

    def _device_array(self, value: Any, what: str, written: bool) -> tuple[Any, np.dtype[Any]]:
        """Return an array as one of CuPy's, and the dtype of its numbers."""
        cupy = self._cupy
        if isinstance(value, cupy.ndarray):
            return value, value.dtype
        device = device_of(value)
        assert device is not None
        with cupy.cuda.Device(device[1]):
            # 0, the default stream, is called 1 by DLPack for CUDA.
            stream = cupy.cuda.get_current_stream().ptr or (0 if device[0] == ROCM else 1)
            exported = export(value, what, stream=stream)
            if written and not exported.writable:
                raise UsageError(f"{what}, a {type_name(type(value))} of a GPU, is read-only; pass a copy")
            low, high = exported.span
            # Which keeps what it was exported by.
            memory = cupy.cuda.UnownedMemory(low, max(high - low, 1), exported.owner, device[1])
            pointer = cupy.cuda.MemoryPointer(memory, exported.address - low)
            # Numbers are moved only: CuPy need not know bfloat16.
            dtype = exported.dtype if exported.dtype.kind != "V" else np.dtype(np.uint16)
            return cupy.ndarray(exported.shape, dtype, pointer, exported.strides), exported.dtype

    def _streams(self, stack: ExitStack) -> dict[int, Any]:
        """Return the current stream of every device that is used; they are waited for when ``stack`` ends."""
        streams = {}
        for device in sorted({array.device.id for array in self._arrays}):
            with self._cupy.cuda.Device(device):
                streams[device] = self._cupy.cuda.get_current_stream()
                stack.callback(streams[device].synchronize)
        return streams

    def _copy(self, begin: Callable[[Any, Array, Any], Any]) -> None:
        """Let ``begin(array, host, stream)`` begin the copy of each array on its device; return when all have ended."""
        # What it returns lives until the streams have come to their ends: copies of what is not contiguous.
        kept = []
        with ExitStack() as stack:
            streams = self._streams(stack)
            for array, host in zip(self._arrays, self.hosts, strict=True):
                if array.nbytes:
                    with self._cupy.cuda.Device(array.device.id):
                        kept.append(begin(array, host, streams[array.device.id]))

    def _fetch(self, array: Any, host: Array, stream: Any) -> Any:
        packed = self._cupy.ascontiguousarray(array)
        packed.data.copy_to_host_async(host.ctypes.data, host.nbytes, stream)
        return packed

    def _put(self, array: Any, host: Array, stream: Any) -> Any:
        packed = array if array.flags.c_contiguous else self._cupy.empty(array.shape, array.dtype)
        packed.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
        if packed is not array:
            array[...] = packed
        return packed

    def write_back(self) -> None:
        """Copy what is in :attr:`hosts` to where it belongs. Raises DeviceError if that fails."""
        try:
            self._copy(self._put)
        except _errors(self._cupy) as error:
            raise DeviceError(
                f"{self._what} cannot be copied back to its GPU: {error}; what arrays on GPUs hold now is undefined"
            ) from error

    def give_back(self) -> None:
        """Nothing uses :attr:`hosts` any more: keep their memory for the next call."""
        block, self._block, self.hosts = self._block, None, []
        if block is not None:
            with _lock:
                _pool.give(block)


def make_like(value: Any, result: Array) -> object:
    """Return ``result`` as a new array of CuPy on the device of ``value``, which is one."""
    cupy = importlib.import_module("cupy")
    with cupy.cuda.Device(value.device.id):
        return cupy.asarray(result)


def _errors(cupy: Any) -> tuple[type[Exception], ...]:
    """Return what CuPy raises of drivers, full memory, and a compiler that fails or is not there."""
    return (RuntimeError, MemoryError, ImportError, OSError, cupy.cuda.compiler.CompileException)


def _load(value: object, what: str) -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UsageError(
            f"{what}, a {type_name(type(value))}, is on a GPU, from which CuPy copies, which cannot be imported"
            f" ({error}): pip install cupy-cuda13x (or cupy-cuda12x, as the driver is; for ROCm see docs.cupy.dev), or"
            " pass a copy on the CPU"
        ) from error
