"""Fixtures to run the examples as a user does: real processes, each test with its own data folder and mesh name."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


class Processes:
    """Starts processes in the clone's root with a data folder of their own, and ends what is left of them."""

    #: For what takes seconds: a machine that is busy with other tests starts processes slowly.
    TIMEOUT_S = 110.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str | os.PathLike[str], **environment: str) -> subprocess.Popen[str]:
        """Start ``python *arguments``."""
        data_dir = {"SPARKLE_DATA_DIR": str(self.folder), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *map(os.fspath, arguments)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | data_dir | environment,
        )
        self._started.append(process)
        return process

    def run_together(self, commands: Sequence[Sequence[str | os.PathLike[str]]]) -> list[Ended]:
        """Run all ``commands`` at once; return how each ended."""
        processes = [self.start(*command) for command in commands]
        ended = []
        for process in processes:
            out, err = process.communicate(timeout=self.TIMEOUT_S)
            ended.append(Ended(process.returncode, out, err))
        return ended

    def run(self, *arguments: str | os.PathLike[str]) -> Ended:
        """Run one process."""
        return self.run_together([arguments])[0]

    def end_all(self) -> None:
        """End what still runs."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each example have its time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(Processes.TIMEOUT_S + 10.0))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder with a short path: a Unix socket is kept under it."""
    folder = Path(tempfile.mkdtemp(prefix="sparkle-test-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def processes(short_folder: Path) -> Iterator[Processes]:
    """Return a starter of processes that share ``short_folder`` as their data folder."""
    starter = Processes(short_folder)
    yield starter
    starter.end_all()


@pytest.fixture
def mesh_name() -> str:
    """Return a mesh name that nobody else uses."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def root() -> Path:
    """Return the clone's root."""
    return ROOT


@pytest.fixture
def load_example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports an example by its file's name, without running it."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    # As for a program that is run: examples import what lies beside them.
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return load
