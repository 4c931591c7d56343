"""How fast a device is: measured once, and kept on disk for devices of the same hardware.

One file per hardware in ``<data_dir>/devices/``, named by a hash of what tells it apart. Whoever measures last
replaces the file whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_CLOCK, SYSTEM_ENTROPY, Clock, Entropy
from sparkle_mesh.devices import transfers
from sparkle_mesh.devices.device import Device, Memory
from sparkle_mesh.devices.kept_profiles import (
    FOLDER,
    SUFFIX,
    VERSION,
    DeviceProfile,
    ProfileFile,
    hardware_words,
    read_profile,
)
from sparkle_mesh.errors import OutOfMemoryError
from sparkle_mesh.files import make_private_folder, write_private

logger = logging.getLogger(__name__)

_FLOATS = ("float32", "float64", "float16")
# Does nothing, in CUDA C++ and in OpenCL C.
_NOTHING = {
    "cuda": 'extern "C" __global__ void sparkle_nothing(int ignored) {}',
    "opencl": "__kernel void sparkle_nothing(int ignored) {}",
}


class ProfileStore:
    """The profiles kept in one data directory."""

    def __init__(self, data_dir: Path, *, clock: Clock = SYSTEM_CLOCK, entropy: Entropy = SYSTEM_ENTROPY) -> None:
        self._folder = data_dir / FOLDER
        self._clock = clock
        self._entropy = entropy

    def profile(self, device: Device) -> DeviceProfile:
        """Return the device's profile: the one that is kept, or else one measured now, which is kept if it is whole.

        Measuring takes about ``limits.PROFILE_BUDGET_S`` at most, with the device to itself.

        Raises
        ------
        DeviceError
            If the device fails while it is measured.
        """
        kept = self.load(device)
        if kept is not None:
            return kept
        profile = measure_profile(device, clock=self._clock)
        rates = (profile.memory_bytes_per_s, profile.to_device_bytes_per_s, profile.from_device_bytes_per_s)
        if all(rates) and ("float32" in profile.gflops or "float32" not in device.capabilities.matmul_dtypes):
            self.save(profile)
        else:
            logger.info("there was no time to measure all of %s; the next one who asks tries again", device)
        return profile

    def load(self, device: Device) -> DeviceProfile | None:
        """Return the profile that is kept, or None. A damaged or foreign file is set aside; never raises for it."""
        hardware = hardware_id(device)
        return read_profile(self.path(hardware), hardware)

    def save(self, profile: DeviceProfile) -> bool:
        """Keep ``profile``; return whether it is. Logs instead of raising."""
        path = self.path(profile.hardware)
        try:
            make_private_folder(self._folder)
            write_private(path, wire.encode(ProfileFile(version=VERSION, profile=profile)), self._entropy)
        except OSError as error:
            logger.warning("profile cannot be kept in %s: %s; it will be measured again", path, error)
            return False
        return True

    def path(self, hardware: str) -> Path:
        """Return the file for a hardware."""
        return self._folder / f"{sha256(hardware.encode()).hexdigest()[:32]}{SUFFIX}"


def hardware_id(device: Device) -> str:
    """Return what devices of the same speed share: model, cores, features, driver; and NumPy's version."""
    info = device.info
    rest = (*info.features, info.driver, np.__version__)
    return " ".join([*hardware_words(info), *(str(part).replace(" ", "_") for part in rest)])


def measure_profile(
    device: Device, *, budget_s: float = limits.PROFILE_BUDGET_S, clock: Clock = SYSTEM_CLOCK
) -> DeviceProfile:
    """Measure a device, with nobody else's work on it, in about ``budget_s`` at most.

    What is left when the time is over is given as 0 (or not at all, in ``gflops``). One step is never interrupted:
    the time may be passed by the compiler's, where it is slow the first time.

    Raises
    ------
    DeviceError
        If the device fails.
    """
    deadline = clock.now() + budget_s
    measuring = _Measuring(device, clock, deadline)
    dtypes = [dtype for dtype in _FLOATS if dtype in device.capabilities.matmul_dtypes]
    rates: dict[str, float] = {}
    memory = upwards = downwards = launch_s = 0.0
    # What matters most comes first: what is slow to compile the first time leaves less for the rest.
    for position, dtype in enumerate(dtypes or [""]):
        # What is left of the time, shared among what is left to measure.
        now = clock.now()
        if dtype:
            rates[dtype] = measuring.matmul_gflops(dtype, now + (deadline - now) / (len(dtypes) - position + 1))
        if position == 0:
            launch_s = measuring.launch_s()
            upwards, downwards = measuring.host_links()
            memory = measuring.memory()
    device.pool.empty()
    return DeviceProfile(
        hardware=hardware_id(device),
        gflops={dtype: rate for dtype, rate in rates.items() if rate},
        memory_bytes_per_s=memory,
        to_device_bytes_per_s=upwards,
        from_device_bytes_per_s=downwards,
        launch_s=launch_s,
        measured_at=clock.wall_time(),
    )


class _Measuring:
    def __init__(self, device: Device, clock: Clock, deadline: float) -> None:
        self._device = device
        self._clock = clock
        self._deadline = deadline

    def host_links(self) -> tuple[float, float]:
        """Return bytes per second to the device, and from it."""
        with ExitStack() as stack:
            blocks = self._blocks(stack, self._copy_bytes(), 1)
            if not blocks:
                return 0.0, 0.0
            memory = blocks[0]
            host = np.ones(self._copy_bytes(), dtype=np.uint8)
            # The first time, pages are made, and pinned memory.
            self._device.copy_from_host(memory, host)
            upwards = self._best(lambda: self._device.copy_from_host(memory, host), wall=True)
            downwards = self._best(lambda: self._device.copy_to_host(memory, host), wall=True)
            return _rate(host.size, upwards), _rate(host.size, downwards)

    def memory(self) -> float:
        """Return bytes read and written per second in a copy on the device."""
        with ExitStack() as stack:
            nbytes = self._copy_bytes()
            blocks = self._blocks(stack, nbytes, 2)
            if not blocks:
                return 0.0
            self._device.clear(blocks[0])
            transfers.copy(blocks[0], blocks[1], nbytes)
            return _rate(2 * nbytes, self._best(lambda: transfers.copy(blocks[0], blocks[1], nbytes)))

    def launch_s(self) -> float:
        """Return the seconds from one small kernel to the next."""
        device = self._device
        count = limits.PROFILE_LAUNCHES_COUNT
        if device.capabilities.language:
            kernel = device.compile(_NOTHING[device.capabilities.language], "sparkle_nothing")
            arguments = [np.int32(0)]
            kernel.launch((1,), (1,), arguments)

            def launch() -> None:
                for _ in range(count):
                    kernel.launch((1,), (1,), arguments)

            return self._best(launch, wall=True) / count
        if "float32" not in device.capabilities.matmul_dtypes:
            return 0.0
        with ExitStack() as stack:
            blocks = self._blocks(stack, 4, 3)
            if not blocks:
                return 0.0
            for block in blocks:
                device.clear(block)
            one = (1, 1)

            def multiply() -> None:
                for _ in range(count):
                    device.matmul(blocks[0], blocks[1], blocks[2], one, one, "float32")

            return self._best(multiply, wall=True) / count

    def matmul_gflops(self, dtype: str, until: float) -> float:
        """Return the best rate over growing matrices, for as long as the next is done by ``until``."""
        best, size = 0.0, limits.PROFILE_MATRIX_MIN_COUNT
        while size <= limits.PROFILE_MATRIX_MAX_COUNT:
            # It runs twice, at the best rate so far: the last one may have been slow because the machine was busy.
            expected_s = 2 * 2e-9 * size**3 / best if best else 0.0
            if self._clock.now() + expected_s >= until:
                break
            with ExitStack() as stack:
                blocks = self._blocks(stack, size * size * np.dtype(dtype).itemsize, 3)
                if not blocks:
                    break
                # Real numbers: zeros need less power, and run faster than anything else.
                self._device.copy_from_host(blocks[0], np.resize(_some_numbers().astype(dtype), (size, size)))
                transfers.copy(blocks[0], blocks[1], size * size * np.dtype(dtype).itemsize)
                work = self._multiplication(blocks, (size, size), dtype)
                # The first one loads and compiles.
                self._device.measure(work)
                took = self._best(work)
            if took:
                best = max(best, 2e-9 * size**3 / took)
            size *= 2
        return best

    def _multiplication(self, blocks: list[Memory], shape: tuple[int, int], dtype: str) -> Callable[[], None]:
        return lambda: self._device.matmul(blocks[0], blocks[1], blocks[2], shape, shape, dtype)

    def _best(self, work: Callable[[], object], *, wall: bool = False) -> float:
        """Return the least seconds of several runs, by the host's clock or the device's; 0 if time is over."""
        if self._is_over():
            return 0.0
        started = self._clock.now()
        best = float("inf")
        while True:
            if wall:
                self._device.synchronize()
                begun = self._clock.now()
                work()
                self._device.synchronize()
                best = min(best, self._clock.now() - begun)
            else:
                best = min(best, self._device.measure(work))
            if self._is_over() or self._clock.now() - started > limits.PROFILE_STEP_S:
                return best

    def _is_over(self) -> bool:
        return self._clock.now() >= self._deadline

    def _copy_bytes(self) -> int:
        """Return what is copied at once: much more than caches hold, and not more than a part of what is free."""
        most = limits.PROFILE_COPY_MAX_BYTES // (2 if self._device.capabilities.unified else 1)
        return min(most, self._device.free_memory_bytes() // 8)

    def _blocks(self, stack: ExitStack, nbytes: int, count: int) -> list[Memory]:
        """Return blocks that go back at the end of ``stack``; none where memory is short."""
        blocks: list[Memory] = []
        if 2 * count * nbytes > self._device.free_memory_bytes():
            return blocks
        try:
            for _ in range(count):
                blocks.append(self._device.pool.allocate(nbytes))
                stack.callback(self._device.pool.free, blocks[-1])
        except OutOfMemoryError as error:
            logger.info("%s is not measured with blocks of %d bytes: %s", self._device, nbytes, error)
            return []
        return blocks


def _some_numbers() -> npt.NDArray[np.float64]:
    return np.random.default_rng(0).random(limits.PROFILE_MATRIX_MIN_COUNT**2)


def _rate(nbytes: int, seconds: float) -> float:
    return nbytes / seconds if seconds else 0.0
