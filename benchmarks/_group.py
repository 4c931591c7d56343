"""The measuring side of ``_worker.py``: starts a group of processes, sends it commands, ends it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

WORKER = Path(__file__).resolve().with_name("_worker.py")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


class GroupError(Exception):
    """A process of a group failed or fell silent; the message ends with its log."""


@dataclass(frozen=True)
class Measurement:
    """One command's results: of every iteration the slowest rank's seconds, and the CPU seconds of all ranks."""

    seconds: list[float]
    cpu_seconds: float
    verified: bool


# Starts one process of a group: gets its number, a command, and options of subprocess.Popen.
Start: TypeAlias = Callable[..., subprocess.Popen[str]]


def start_here(number: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start ``command`` on this machine."""
    return subprocess.Popen(command, **options)


class Group:
    """``size`` processes of one backend, idle between commands. A context manager; leaving it ends them.

    ``start`` starts each of them, by default on this machine.
    """

    def __init__(self, backend: str, size: int, start: Start = start_here) -> None:
        self.backend, self.size, self._start = backend, size, start
        self._folder = tempfile.TemporaryDirectory(prefix=f"sparkle-bench-{backend}-", ignore_cleanup_errors=True)
        self._logs = [Path(self._folder.name) / f"worker-{number}.log" for number in range(size)]
        self._workers: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._replies: list[queue.SimpleQueue[str]] = []

    def __enter__(self) -> Group:
        folder = Path(self._folder.name) / f"{self.backend}-{secrets.token_hex(4)}"  # sparkle's mesh is named after it
        folder.mkdir()
        try:
            for number, log in enumerate(self._logs):
                command = [sys.executable, str(WORKER), self.backend, str(number), str(self.size), str(folder)]
                with log.open("w") as errors:
                    worker = self._start(
                        number,
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        env=os.environ | {"SPARKLE_DATA_DIR": str(folder)},
                    )
                replies: queue.SimpleQueue[str] = queue.SimpleQueue()
                reader = threading.Thread(target=self._read, args=(worker, replies), daemon=True)
                reader.start()
                self._workers.append(worker)
                self._replies.append(replies)
                self._readers.append(reader)
            ranks = sorted(reply["rank"] for reply in self._collect(START_TIMEOUT_S))
            if ranks != list(range(self.size)):
                raise GroupError(f"{self.backend}: the ranks are {ranks}, not 0 to {self.size - 1}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @staticmethod
    def _read(worker: subprocess.Popen[str], replies: queue.SimpleQueue[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            replies.put(line)
        replies.put("")

    def measure(self, nbytes: int, iterations: int, warmup: int, algorithm: str, timeout_s: float) -> Measurement:
        """Reduce ``nbytes`` bytes of float32 ``iterations`` times.

        Raises
        ------
        GroupError
            If a process ends or does not answer within ``timeout_s``.
        """
        command = {"bytes": nbytes, "iterations": iterations, "warmup": warmup, "algorithm": algorithm}
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its log is shown by _collect
                worker.stdin.write(json.dumps(command) + "\n")
                worker.stdin.flush()
        replies = self._collect(timeout_s)
        return Measurement(
            seconds=[max(of_ranks) for of_ranks in zip(*(reply["seconds"] for reply in replies), strict=True)],
            cpu_seconds=sum(reply["cpu_seconds"] for reply in replies),
            verified=all(reply["verified"] for reply in replies),
        )

    def _collect(self, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        waiting = set(range(self.size))
        lines: dict[int, str] = {}
        while waiting:
            for number in sorted(waiting):
                with contextlib.suppress(queue.Empty):
                    lines[number] = self._replies[number].get(timeout=0.005)
                    waiting.discard(number)
                    if not lines[number]:
                        raise GroupError(f"{self.backend}: process {number} ended:\n{self._tail(number)}")
            if waiting and time.monotonic() > deadline:
                number = min(waiting)
                silent = f"process {number} did not answer within {timeout_s:.0f} s"
                raise GroupError(f"{self.backend}: {silent}:\n{self._tail(number)}")
        return [json.loads(lines[number]) for number in range(self.size)]

    def _tail(self, number: int) -> str:
        return "\n".join(self._logs[number].read_text(errors="replace").splitlines()[-20:]) or "(it printed nothing)"

    def _end(self) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for worker in self._workers:
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        for worker, reader in zip(self._workers, self._readers, strict=True):
            reader.join()
            assert worker.stdout is not None
            worker.stdout.close()
        self._folder.cleanup()
