"""Imports py-libp2p at less than its usual price.

Its packages import HTTP clients that only optional parts of it use. Here those are executed when one of their
names is first used, which for most programs is never. (The standard library's lazy loader does not do: an
``import`` statement reads the module's spec, and with it that already counts as use.) The collector rests
meanwhile, because an import makes tens of thousands of objects that all stay.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# What py-libp2p imports as modules, not names out of them.
_LAZY_MODULES = ("httpx", "requests", "miniupnpc")


class _LazyModule(ModuleType):
    """A module that is executed when a name is looked up that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        with _lock:
            if type(self) is _LazyModule and not vars(self).get("_sparkle_executing"):
                vars(self)["_sparkle_executing"] = True
                spec = self.__spec__
                if spec is not None and spec.loader is not None:
                    spec.loader.exec_module(self)
                del vars(self)["_sparkle_executing"]
                self.__class__ = ModuleType  # type: ignore[assignment]
        return ModuleType.__getattribute__(self, name)


_lock = threading.RLock()


def import_lazily(name: str) -> None:
    """Have module ``name`` executed at its first use; nothing if it is loaded already, or absent."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    lazy = _LazyModule(name)
    module = importlib.util.module_from_spec(spec)
    vars(lazy).update(vars(module))
    sys.modules[name] = lazy


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
    """Load the parts of py-libp2p that a fabric uses."""
    if "libp2p" not in sys.modules:
        for name in _LAZY_MODULES:
            import_lazily(name)
    with _resting_collector():
        importlib.import_module("sparkle_mesh.fabric.assembly")
        importlib.import_module("sparkle_mesh.fabric.gossip")
