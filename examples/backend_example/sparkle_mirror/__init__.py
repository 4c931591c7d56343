"""Devices whose memory is NumPy arrays elsewhere: a backend to copy from."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from sparkle_mesh.backends import Backend, Device, DeviceCapabilities, DeviceInfo, Prepared, Product, Program
from sparkle_mirror.programs import MirrorProgram

DEVICE_COUNT = 2
MEMORY_BYTES = 256 * 2**20
DTYPES = frozenset(
    {"bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
)


class Driver:
    """Stands for your hardware's library: it hands out blocks by number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._blocks: dict[int, np.ndarray] = {}
        self.free_bytes = MEMORY_BYTES

    def allocate(self, nbytes: int) -> int | None:
        """Return the number of a new block; None if there is no room."""
        with self._lock:
            if nbytes > self.free_bytes:
                return None
            self.free_bytes -= nbytes
            number = next(self._numbers)
            self._blocks[number] = np.empty(nbytes, np.uint8)
            return number

    def free(self, number: int) -> None:
        """Give a block back."""
        with self._lock:
            self.free_bytes += self._blocks.pop(number).size

    def block(self, number: int) -> np.ndarray:
        """Return the bytes of a block."""
        return self._blocks[number]


class MirrorDevice(Device):
    """One of them. What Sparkle calls a block's ``native`` is the driver's number of it."""

    def __init__(self, index: int) -> None:
        info = DeviceInfo(kind="mirror", index=index, name=f"mirror {index}", memory_bytes=MEMORY_BYTES)
        super().__init__(info, DeviceCapabilities(dtypes=DTYPES, matmul_dtypes=DTYPES))
        self.driver = Driver()

    def free_memory_bytes(self) -> int:
        """Return what the driver has left."""
        return self.driver.free_bytes

    def synchronize(self) -> None:
        """Return at once: a mirror does all that it is asked right away."""

    def prepare_program(self, program: Program) -> Prepared:
        """Return ``program`` made ready; called once for each."""
        return MirrorProgram(self, program)

    # --- What Sparkle asks of every device: natives are those that _allocate gave, arguments were checked ---

    def _allocate(self, nbytes: int) -> int:
        number = self.driver.allocate(nbytes)
        if number is None:
            raise self.pool.out_of_memory(nbytes)
        return number

    def _free(self, native: int) -> None:
        self.driver.free(native)

    def _write(self, native: int, array: np.ndarray, offset_bytes: int) -> None:
        self.driver.block(native)[offset_bytes : offset_bytes + array.size] = array

    def _read(self, native: int, array: np.ndarray, offset_bytes: int) -> None:
        array[:] = self.driver.block(native)[offset_bytes : offset_bytes + array.size]

    def _clear(self, native: int, nbytes: int) -> None:
        self.driver.block(native)[:nbytes] = 0

    def _copy_between(self, source: Device, native: int, target: Device, to: int, nbytes: int) -> bool:
        # Both are of this kind; two cards that cannot reach each other would return False.
        assert isinstance(source, MirrorDevice)
        assert isinstance(target, MirrorDevice)
        target.driver.block(to)[:nbytes] = source.driver.block(native)[:nbytes]
        return True

    def _multiplier(self, product: Product) -> Callable[[int, int, int], None]:
        # For whoever calls device.matmul; programs have a step of their own for it. A device may do without.
        def array(number: int, shape: Sequence[int]) -> np.ndarray:
            nbytes = prod(shape) * product.dtype.itemsize
            return self.driver.block(number)[:nbytes].view(product.dtype).reshape(shape)

        def multiply(a: int, b: int, out: int) -> None:
            with np.errstate(all="ignore"):
                np.matmul(array(a, product.shape_a), array(b, product.shape_b), out=array(out, product.shape))

        return multiply


class MirrorBackend(Backend):
    """What the entry point names: Sparkle makes one, and asks it for devices."""

    def __init__(self) -> None:
        self._devices = tuple(MirrorDevice(index) for index in range(DEVICE_COUNT))

    @property
    def kind(self) -> str:
        """The kind of its devices."""
        return "mirror"

    def devices(self) -> tuple[Device, ...]:
        """Return the same devices each time; none, where there is no hardware."""
        return self._devices
