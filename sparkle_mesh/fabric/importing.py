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
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# What py-libp2p imports as modules, not names out of them.
_LAZY_MODULES = ("httpx", "requests", "miniupnpc")


class _LazyModule(ModuleType):
    """Stands for a module that is imported when one of its names is first used."""

    def __getattr__(self, name: str) -> Any:
        _forget(self.__name__)
        return getattr(importlib.import_module(self.__name__), name)


def _forget(name: str) -> None:
    if isinstance(sys.modules.get(name), _LazyModule):
        del sys.modules[name]


@contextmanager
def imported_lazily(*names: str) -> Iterator[None]:
    """Have modules imported at their first use where the block imports them; elsewhere they are as ever.

    Modules that are loaded already, or absent, are left alone.
    """
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            sys.modules[name] = _LazyModule(name)
    try:
        yield
    finally:
        for name in names:
            _forget(name)


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
    with imported_lazily(*_LAZY_MODULES), _resting_collector():
        importlib.import_module("sparkle_mesh.fabric.assembly")
        importlib.import_module("sparkle_mesh.fabric.gossip")
