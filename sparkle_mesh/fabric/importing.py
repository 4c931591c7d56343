"""Imports py-libp2p at a third of its usual price or less.

Most of what py-libp2p imports serves transports, key types and discoveries that a fabric does not use: QUIC, RSA,
mDNS, DNS, Prometheus, HTTP. Ten processes that start at once on two cores wait seconds for that. So, while a fabric's
parts are imported (and only then):

- A package of libp2p does not run its ``__init__``, which lists all that the package has, until one of its own names
  is asked for. A module that is imported by its full name does not ask.
- Modules named below are not loaded: what is imported from them are stand-ins that load the module when they are
  called, asked for an attribute, or compared with.

Nothing is ever missing: other code that imports the same modules gets the real ones. The standard library's lazy loader
does not do here, because an ``import`` statement reads the module's spec, which counts as use. The collector rests
meanwhile: an import makes tens of thousands of objects that all stay.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Modules of which libp2p's modules take names that a fabric never uses, or uses late.
_POSTPONED_MODULES = (
    "aioquic.quic.connection",
    "coincurve",
    "httpx",
    "libp2p.crypto.rsa",
    "libp2p.discovery.bootstrap.bootstrap",
    "libp2p.discovery.mdns.mdns",
    "libp2p.rcmgr.prometheus_exporter",
    "libp2p.security.pnet.protector",
    "libp2p.security.tls.autotls.acme",
    "libp2p.security.tls.autotls.broker",
    "miniupnpc",
    "multiaddr.resolvers",
    "prometheus_client",
    "requests",
)

_FABRIC_MODULES = (
    "sparkle_mesh.fabric.assembly",
    "sparkle_mesh.fabric.gossip",
    "sparkle_mesh.fabric.libp2p_reach",
)


class _StandIn(type):
    """Stands for what a postponed module calls ``path``; a class, so that annotations may name it."""

    _module: str
    _path: tuple[str, ...]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if _postponing_here():
            return _stand_in(cls._module, (*cls._path, name))
        return getattr(_real(cls), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real(cls)(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        # Before its module is loaded, nothing can be of a class.
        return cls._module in sys.modules and isinstance(instance, _real(cls))


def _stand_in(module: str, path: tuple[str, ...]) -> _StandIn:
    return _StandIn(path[-1], (), {"_module": module, "_path": path})


def _real(stand_in: _StandIn) -> Any:
    found: Any = importlib.import_module(stand_in._module)
    for name in stand_in._path:
        found = getattr(found, name)
    return found


class _PostponedModule(ModuleType):
    """In the place of a module while libp2p is imported; later, for who kept it, the module itself."""

    def __getattr__(self, name: str) -> Any:
        if not _postponing_here():
            # Another thread may import the same module meanwhile.
            _forget(self.__name__)
            return getattr(importlib.import_module(self.__name__), name)
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(self.__name__, (name,))


def _forget(name: str) -> None:
    if isinstance(sys.modules.get(name), _PostponedModule):
        del sys.modules[name]


class _HollowPackage(ModuleType):
    """A package that runs its ``__init__`` when one of its names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            with _filling:
                loader = vars(self).pop("_postponed_loader", None)
                if loader is not None:
                    loader.exec_module(self)
                if name in vars(self):
                    return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _HollowLoader(Loader):
    """Makes a package with an empty namespace."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _HollowPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        vars(module)["_postponed_loader"] = self._loader


class _HollowFinder:
    """Finds libp2p's packages, to be made hollow."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "libp2p":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.submodule_search_locations is not None and spec.loader is not None:
            spec.loader = _HollowLoader(spec.loader)
        return spec


_filling = threading.RLock()
_importing = threading.Lock()
#: The thread in the middle of :func:`postponed`.
_postponing_thread: int | None = None


def _postponing_here() -> bool:
    return _postponing_thread == threading.get_ident()


@contextmanager
def postponed(*names: str) -> Iterator[None]:
    """Keep the block's imports from loading the modules ``names``, and libp2p's packages from filling themselves.

    Modules that are loaded already, or absent, are left alone.
    """
    global _postponing_thread
    kept = [name for name in names if name not in sys.modules and _is_installed(name)]
    sys.modules.update((name, _PostponedModule(name)) for name in kept)
    sys.meta_path.insert(0, _HollowFinder)
    _postponing_thread = threading.get_ident()
    try:
        yield
    finally:
        _postponing_thread = None
        sys.meta_path.remove(_HollowFinder)
        for name in kept:
            _forget(name)


def _is_installed(name: str) -> bool:
    """Whether the distribution of ``name`` is there; its packages are not imported to see."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None


@contextmanager
def _resting_collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_libp2p() -> None:
    """Load the parts of py-libp2p that a fabric uses; returns at once if they are."""
    with _importing:
        if not all(name in sys.modules for name in _FABRIC_MODULES):
            with postponed(*_POSTPONED_MODULES), _resting_collector():
                for name in _FABRIC_MODULES:
                    importlib.import_module(name)
