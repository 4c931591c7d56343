"""The processor as a device: its blocks are NumPy arrays of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits
from sparkle_mesh.devices.detect import DeviceInfo, detect_cpu, free_memory_bytes, usable_logical_cores
from sparkle_mesh.devices.device import Backend, Device, DeviceCapabilities, Native, Shape
from sparkle_mesh.devices.products import Product
from sparkle_mesh.devices.threads import in_threads

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
#: What NumPy computes with, and multiplies matrices of.
NUMERIC_DTYPES = frozenset({"bool", *_INTEGERS, "float16", "float32", "float64", "complex64", "complex128"})
_DLPACK_CPU = 1


class CpuDevice(Device):
    """All processors of this machine, computing through NumPy."""

    def __init__(self, info: DeviceInfo | None = None) -> None:
        capabilities = DeviceCapabilities(
            dtypes=NUMERIC_DTYPES,
            matmul_dtypes=NUMERIC_DTYPES,
            memory_is_host=True,
            host_cores=max(usable_logical_cores(), 1),
            unified=True,
        )
        super().__init__(info or detect_cpu(), capabilities)

    def free_memory_bytes(self) -> int:
        """Return what this process may still take, by the operating system and the container's limit."""
        return free_memory_bytes()

    def synchronize(self) -> None:
        """Return at once: NumPy has done all that it was asked."""

    def dlpack_device(self) -> tuple[int, int]:
        """Return the device as DLPack numbers it."""
        return (_DLPACK_CPU, 0)

    def _allocate(self, nbytes: int) -> Native:
        # Linux grants what is not there, and ends the process when it is used.
        if nbytes >= limits.HOST_CHECKED_MIN_BYTES and nbytes > self.free_memory_bytes():
            raise self.pool.out_of_memory(nbytes)
        try:
            block = np.empty(nbytes + limits.MEMORY_ALIGNMENT_BYTES, dtype=np.uint8)
        except MemoryError as error:
            raise self.pool.out_of_memory(nbytes, str(error)) from error
        start = -block.ctypes.data % limits.MEMORY_ALIGNMENT_BYTES
        return block[start : start + nbytes]

    def _free(self, native: Native) -> None:
        """Let it go with its last reference."""

    def _write(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        _copy(array, native[offset_bytes : offset_bytes + array.size])

    def _read(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        _copy(native[offset_bytes : offset_bytes + array.size], array)

    def _clear(self, native: Native, nbytes: int) -> None:
        native[:nbytes] = 0

    def _copy_between(self, source: Device, native: Native, target: Device, to: Native, nbytes: int) -> bool:
        _copy(native[:nbytes], to[:nbytes])
        return True

    def _view(self, native: Native, dtype: np.dtype[Any], count: int, owner: object) -> npt.NDArray[Any]:
        exported = np.asarray(_Export(native, owner))
        return exported[: count * dtype.itemsize].view(dtype)

    def _multiplier(self, product: Product) -> Callable[[Native, Native, Native], None]:
        dtype = product.dtype

        def multiply(a: Native, b: Native, out: Native) -> None:
            left, right = _dense(a, product.shape_a, dtype), _dense(b, product.shape_b, dtype)
            # As on other devices: infinities and NaNs tell, not warnings.
            with np.errstate(all="ignore"):
                np.matmul(left, right, out=_dense(out, product.shape, dtype))

        return multiply


class CpuBackend(Backend):
    """Finds the one CPU device."""

    def __init__(self) -> None:
        self._devices: tuple[Device, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of its devices."""
        return "cpu"

    def devices(self) -> tuple[Device, ...]:
        """Return the CPU."""
        if not self._devices:
            self._devices = (CpuDevice(),)
        return self._devices


class _Export:
    """Lets NumPy make an array over a block that keeps its owner alive."""

    def __init__(self, block: npt.NDArray[np.uint8], owner: object) -> None:
        self._block = block
        self._owner = owner
        self.__array_interface__ = block.__array_interface__


def _dense(native: Native, shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    dense: npt.NDArray[Any] = native[:size].view(dtype).reshape(shape)
    return dense


def _copy(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    """Copy bytes, in threads where there are many."""
    piece = limits.THREAD_PIECE_BYTES

    def work(pieces: range) -> None:
        for index in pieces:
            part = slice(index * piece, (index + 1) * piece)
            np.copyto(target[part], source[part])

    in_threads(-(-source.size // piece), work)
