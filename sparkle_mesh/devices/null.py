"""A device that holds nothing and computes nothing, for plans and tests: it checks, and counts what it is asked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sparkle_mesh.devices.compiled import CompiledKernel
from sparkle_mesh.devices.cpu import NUMERIC_DTYPES
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.devices.device import Backend, Device, DeviceCapabilities, Native
from sparkle_mesh.devices.products import Product


class NullDevice(Device):
    """A device of a stated memory that keeps no bytes: what is copied from it leaves the host array as it was.

    Attributes
    ----------
    counts
        How often each thing was asked, and how many bytes were written, read, cleared and copied: ``allocate``,
        ``free``, ``write``, ``read``, ``clear``, ``copy``, ``compile``, ``launch``, ``matmul``, ``synchronize``,
        and ``write_bytes``, ``read_bytes``, ``clear_bytes``, ``copy_bytes``.

    Parameters
    ----------
    index, memory_bytes
        Of the pretended device.
    language
        Of the sources that it pretends to compile; empty for none.
    """

    def __init__(
        self, index: int = 0, *, memory_bytes: int = 2**40, language: Literal["", "cuda", "opencl"] = "opencl"
    ) -> None:
        capabilities = DeviceCapabilities(
            dtypes=NUMERIC_DTYPES,
            matmul_dtypes=NUMERIC_DTYPES,
            language=language,
            keeps_nothing=True,
            local_size_max=1024 if language else 0,
        )
        self.counts: Counter[str] = Counter()
        self._counts_lock = threading.RLock()
        super().__init__(DeviceInfo(kind="null", index=index, name="nothing", memory_bytes=memory_bytes), capabilities)

    def free_memory_bytes(self) -> int:
        """Return what is left of the stated memory."""
        return self.info.memory_bytes - self.allocated_bytes

    def synchronize(self) -> None:
        """Count the call."""
        self._note("synchronize")

    def _allocate(self, nbytes: int) -> Native:
        if nbytes > self.free_memory_bytes():
            raise self.pool.out_of_memory(nbytes)
        self._note("allocate")

    def _free(self, native: Native) -> None:
        self._note("free")

    def _write(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        self._note("write", array.size)

    def _read(self, native: Native, array: npt.NDArray[np.uint8], offset_bytes: int) -> None:
        self._note("read", array.size)

    def _clear(self, native: Native, nbytes: int) -> None:
        self._note("clear", nbytes)

    def _copy_between(self, source: Device, native: Native, target: Device, to: Native, nbytes: int) -> bool:
        self._note("copy", nbytes)
        return True

    def _compile(self, source: str, name: str, options: tuple[str, ...]) -> CompiledKernel:
        self._note("compile")
        return _NullKernel(self, name)

    def _multiplier(self, product: Product) -> Callable[[Native, Native, Native], None]:
        return lambda a, b, out: self._note("matmul")

    def _note(self, what: str, nbytes: int | None = None) -> None:
        # Reentrant: a finalizer may free in the midst of it.
        with self._counts_lock:
            self.counts[what] += 1
            if nbytes is not None:
                self.counts[f"{what}_bytes"] += nbytes


class NullBackend(Backend):
    """Some null devices; the registry knows of them only when it is told to."""

    def __init__(self, devices: Sequence[NullDevice] = ()) -> None:
        self._devices = tuple(devices) or (NullDevice(),)

    @property
    def kind(self) -> str:
        """The kind of its devices."""
        return "null"

    def devices(self) -> tuple[Device, ...]:
        """Return them."""
        return self._devices


class _NullKernel(CompiledKernel):
    def _launch(self, global_size: tuple[int, ...], local_size: tuple[int, ...] | None, arguments: list[Any]) -> None:
        assert isinstance(self.device, NullDevice)
        self.device._note("launch")
