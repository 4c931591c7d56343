"""Nodes of all kinds for tests of the command: fake ones in this process, fake and real ones as processes."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FAKE_NODE = Path(__file__).with_name("fake_node.py")
DEADLINE_S = 50.0


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module ``fake_node``."""
    spec = importlib.util.spec_from_file_location("sparkle_fake_node", FAKE_NODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty data directory."""
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """Put back the handlers that a node of this process replaced."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class NodeProcess:
    """A process of ``sparkle-node``; its lines are read as they come."""

    def __init__(self, command: list[str], data_dir: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SPARKLE_DATA_DIR": str(data_dir), **environment},
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_err)]
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def _read_err(self) -> None:
        assert self.process.stderr is not None
        self._errors.extend(line.rstrip("\n") for line in self.process.stderr)

    def wait_for(self, part: str, timeout_s: float = DEADLINE_S) -> str:
        """Return the next line that contains ``part``; fail with all that was said otherwise."""
        while True:
            try:
                line = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                line = None
            if line is None:
                said = "\n".join([*self.lines, *self._errors])
                pytest.fail(f"no {part!r}; the node said:\n{said}")
            self.lines.append(line)
            if part in line:
                return line

    def wait_for_event(self, event: str) -> dict[str, Any]:
        """Return the next JSON line that tells of ``event``."""
        found: dict[str, Any] = json.loads(self.wait_for(f'"event":"{event}"'))
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = DEADLINE_S) -> tuple[int, list[str], list[str]]:
        """Wait for the end; return the exit code and the lines of stdout and stderr."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        while (line := self._queue.get(timeout=timeout_s)) is not None:
            self.lines.append(line)
        self._queue.put(None)
        return code, self.lines, self._errors

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def start() -> Iterator[Callable[..., NodeProcess]]:
    """Return a function that starts a node process, ``real`` or fake; all are ended after the test."""
    started: list[NodeProcess] = []

    def start_one(data_dir: Path, *arguments: str, real: bool = False, **environment: str) -> NodeProcess:
        program = ["-m", "sparkle_mesh.cli.node"] if real else [str(FAKE_NODE)]
        started.append(NodeProcess([sys.executable, *program, *arguments], data_dir, **environment))
        return started[-1]

    yield start_one
    for process in started:
        process.close()


@pytest.fixture
def ask_node(data_dir: Path) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command of ``sparkle-node`` and returns exit code, stdout, stderr."""

    def run(*arguments: str, data_dir: Path = data_dir) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "sparkle_mesh.cli.node", *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env={**os.environ, "SPARKLE_DATA_DIR": str(data_dir)},
        )
        return done.returncode, done.stdout, done.stderr

    return run
