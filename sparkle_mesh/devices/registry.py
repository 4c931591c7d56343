"""Finds the devices of this machine, through the backends that are built in and those of other packages.

A package adds a backend of its own under the entry-point group ``sparkle_mesh.backends``: a class, or a function,
that takes no arguments and returns a :class:`~sparkle_mesh.devices.device.Backend`. What is not installed is not
imported; what fails to load is told once in the log, and left out.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable
from importlib import metadata

from sparkle_mesh import limits
from sparkle_mesh.devices.cpu import CpuBackend
from sparkle_mesh.devices.device import Backend, Device
from sparkle_mesh.errors import DeviceError, UsageError

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "sparkle_mesh.backends"
#: What a driver's or another package's code may raise while it is loaded and looks for devices.
_LOADING_ERRORS = (
    *(ImportError, SyntaxError, OSError, RuntimeError, DeviceError),
    *(AttributeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError),
)


class Registry:
    """Backends and their devices, looked for once, when first asked.

    Parameters
    ----------
    duplicates
        Whether OpenCL also shows the GPUs that the cuda or rocm backend serves.
    extra
        Backends beside those that are found, as the null one.
    entry_points
        Those of other packages; by default, of all that are installed.
    """

    def __init__(
        self,
        *,
        duplicates: bool = False,
        extra: Iterable[Backend] = (),
        entry_points: Callable[[], Iterable[metadata.EntryPoint]] | None = None,
    ) -> None:
        self._duplicates = duplicates
        self._extra = tuple(extra)
        self._entry_points = entry_points or (lambda: metadata.entry_points(group=ENTRY_POINT_GROUP))
        self._lock = threading.Lock()
        self._backends: tuple[Backend, ...] | None = None
        self._devices: tuple[Device, ...] = ()

    def backends(self) -> tuple[Backend, ...]:
        """Return the backends that loaded: the CPU's first."""
        self._look()
        return self._backends or ()

    def devices(self, kind: str | None = None) -> tuple[Device, ...]:
        """Return the devices, or those of one kind; the CPU first."""
        self._look()
        return tuple(device for device in self._devices if kind in (None, device.kind))

    def device(self, name: str | Device = "cpu") -> Device:
        """Return the device called ``name``: ``"cuda:1"``, or ``"cuda"`` for the first of its kind.

        Raises
        ------
        UsageError
            If there is none; the message names those that there are.
        """
        if isinstance(name, Device):
            return name
        if not isinstance(name, str):
            raise UsageError(f"device is {name!r}; give a name such as 'cuda:0', or a Device")
        kind, _, index = name.partition(":")
        for device in self.devices(kind):
            if not index or str(device.index) == index:
                return device
        known = ", ".join(map(str, self.devices()))
        raise UsageError(f"there is no device {name!r} here; there are {known}")

    def close(self) -> None:
        """Give back what the devices keep."""
        with self._lock:
            devices, self._devices, self._backends = self._devices, (), None
        for device in devices:
            device.close()

    def _look(self) -> None:
        with self._lock:
            if self._backends is not None:
                return
            backends: list[Backend] = []
            devices: list[Device] = []
            for name, make in self._makers(devices):
                try:
                    backend = make()
                    if not isinstance(backend, Backend):
                        raise TypeError(f"it gave {backend!r}, which is no Backend")
                    if any(backend.kind == other.kind for other in backends):
                        raise ValueError(f"there is a backend of kind {backend.kind!r} already")
                    found = tuple(backend.devices())[: limits.DEVICES_MAX_COUNT]
                except _LOADING_ERRORS as error:
                    logger.warning("backend %s cannot be used: %s; going on without", name, error)
                    continue
                backends.append(backend)
                devices += found
            self._backends, self._devices = tuple(backends), tuple(devices)

    def _makers(self, found: list[Device]) -> Iterable[tuple[str, Callable[[], Backend]]]:
        """Yield names of backends and how to make them; ``found`` grows between one and the next."""
        yield "cpu", CpuBackend
        if is_installed("cupy"):
            yield "cupy", _make_cupy
        if is_installed("pyopencl"):
            yield "opencl", lambda: _make_opencl(() if self._duplicates else {device.kind for device in found})
        for backend in self._extra:
            yield backend.kind, lambda backend=backend: backend  # type: ignore[misc]
        for point in self._entry_points():
            yield f"{point.name} ({point.value})", lambda point=point: point.load()()  # type: ignore[misc]


def is_installed(package: str) -> bool:
    """Return whether a top-level package could be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def _make_cupy() -> Backend:
    from sparkle_mesh.devices.cupy_device import CupyBackend

    return CupyBackend()


def _make_opencl(served_kinds: Iterable[str]) -> Backend:
    from sparkle_mesh.devices.opencl_device import OpenClBackend

    return OpenClBackend(served_kinds=tuple(served_kinds))
