"""Real processes that join a mesh: start them, read what they say, end them."""

from __future__ import annotations

import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkle_mesh.async_mesh import AsyncMesh

WORKER = Path(__file__).with_name("worker.py")
DEADLINE_S = 50.0


class Worker:
    """One process running ``worker.py``; its lines are read as they come."""

    def __init__(self, data_dir: Path, mesh: str, scenario: str, *arguments: str) -> None:
        environment = {**os.environ, "SPARKLE_DATA_DIR": str(data_dir), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), mesh, scenario, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_for(self, prefix: str, timeout_s: float = DEADLINE_S) -> str:
        """Return the rest of the next line that begins with ``prefix``; fail with all output otherwise."""
        while True:
            try:
                line = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                pytest.fail(f"no {prefix!r} in {timeout_s} s; said:\n" + "\n".join(self.lines))
            if line is None:
                pytest.fail(f"ended without {prefix!r}; said:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if line.startswith(prefix):
                return line.removeprefix(prefix).strip()

    def go_on(self) -> None:
        """Let a scenario that waits for its input to end go on."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait for the process to end by itself; return its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end in {timeout_s} s; said:\n" + "\n".join(self.lines))

    def destroy(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self._reader.join(5)
        self.process.stdout.close()


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start ``worker.py SCENARIO …`` in a mesh and data directory of this test's own."""
    workers: list[Worker] = []
    mesh = f"test-{secrets.token_hex(6)}"

    def start(scenario: str, *arguments: str) -> Worker:
        worker = Worker(tmp_path, mesh, scenario, *arguments)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.destroy()


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return what makes the arguments of a join: over TCP on this host, and apart from those with another folder."""

    def make(folder: str = "", **changes: Any) -> dict[str, Any]:
        return {
            "min_peers": 2,
            "timeout_s": 30,
            "lan": False,
            "listen": ["/ip4/127.0.0.1/tcp/0"],
            "data_dir": tmp_path / folder,
            "links": ["tcp"],
        } | changes

    return make


@pytest.fixture
def vanish() -> Callable[[AsyncMesh], Awaitable[None]]:
    """Return what lets a member go as one that is cut off: its links end, and nobody hears of it again."""

    async def go(mesh: AsyncMesh) -> None:
        await mesh._node.membership.leave(hurry=True)
        for link in list(mesh._follower.links.values()):
            await link.aclose()

    return go
