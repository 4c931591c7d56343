"""The benchmarks' modules, imported as the programs import each other."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a module of ``benchmarks/`` by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
