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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

from _backends import BACKENDS

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
    error: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)


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
        self._commands: list[IO[str]] = []
        self._readers: list[threading.Thread] = []
        self._replies: list[queue.SimpleQueue[str]] = []

    def __enter__(self) -> Group:
        folder = Path(self._folder.name) / f"{self.backend}-{secrets.token_hex(4)}"  # sparkle's mesh is named after it
        folder.mkdir()
        try:
            if (launcher := BACKENDS[self.backend].launcher(self.size)) is not None:
                self._launch(launcher, folder)
            else:
                for number in range(self.size):
                    worker = self._start_one(number, folder, [])
                    assert worker.stdin is not None
                    assert worker.stdout is not None
                    self._listen(worker.stdin, worker.stdout)
            ranks = sorted(reply["rank"] for reply in self._collect(START_TIMEOUT_S))
            if ranks != list(range(self.size)):
                raise GroupError(f"{self.backend}: the ranks are {ranks}, not 0 to {self.size - 1}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start_one(self, number: int, folder: Path, launcher: list[str]) -> subprocess.Popen[str]:
        command = [*launcher, sys.executable, str(WORKER), self.backend, str(number), str(self.size), str(folder)]
        with self._logs[number].open("w") as log:
            worker = self._start(
                number,
                command,
                stdin=subprocess.PIPE,
                stdout=log if launcher else subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"SPARKLE_DATA_DIR": str(folder)},
            )
        self._workers.append(worker)
        return worker

    def _launch(self, launcher: list[str], folder: Path) -> None:
        """Start all processes by one command; named pipes take the place of their stdin and stdout."""
        pipes = [(folder / f"commands-{rank}", folder / f"replies-{rank}") for rank in range(self.size)]
        for pipe in (path for pair in pipes for path in pair):
            os.mkfifo(pipe)
        worker = self._start_one(0, folder, launcher)
        for commands, replies in pipes:
            # Opened for both, so that opening waits for nobody; the end of the launcher is the end of all.
            self._listen(
                os.fdopen(os.open(commands, os.O_RDWR), "w"), os.fdopen(os.open(replies, os.O_RDWR), "r", buffering=1)
            )
        threading.Thread(target=self._tell_of_the_end, args=(worker, [r for _, r in pipes]), daemon=True).start()

    @staticmethod
    def _tell_of_the_end(worker: subprocess.Popen[str], pipes: list[Path]) -> None:
        worker.wait()
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.write_text("\n")

    def _listen(self, commands: IO[str], answers: IO[str]) -> None:
        replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=self._read, args=(answers, replies), daemon=True)
        reader.start()
        self._commands.append(commands)
        self._replies.append(replies)
        self._readers.append(reader)

    @staticmethod
    def _read(answers: IO[str], replies: queue.SimpleQueue[str]) -> None:
        with answers:
            for line in answers:
                if not line.strip():
                    break
                replies.put(line)
        replies.put("")

    def measure(
        self,
        nbytes: int,
        iterations: int,
        warmup: int,
        algorithm: str,
        timeout_s: float,
        compression: str | None = None,
        in_flight: int = 1,
    ) -> Measurement:
        """Reduce ``nbytes`` bytes of float32 ``iterations`` times.

        Raises
        ------
        GroupError
            If a process ends or does not answer within ``timeout_s``.
        """
        command = {
            "bytes": nbytes,
            "iterations": iterations,
            "warmup": warmup,
            "algorithm": algorithm,
            "compression": compression,
            "in_flight": in_flight,
        }
        for commands in self._commands:
            with contextlib.suppress(BrokenPipeError):  # its log is shown by _collect
                commands.write(json.dumps(command) + "\n")
                commands.flush()
        replies = self._collect(timeout_s)
        return Measurement(
            seconds=[max(of_ranks) for of_ranks in zip(*(reply["seconds"] for reply in replies), strict=True)],
            cpu_seconds=sum(reply["cpu_seconds"] for reply in replies),
            verified=all(reply["verified"] for reply in replies),
            error=max(reply.get("error", 0.0) for reply in replies),
            told=replies[0].get("told", {}),
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
        # Processes of one launcher have one log.
        log = self._logs[min(number, len(self._workers) - 1)]
        return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) or "(it printed nothing)"

    def _end(self) -> None:
        if len(self._workers) < len(self._commands):
            # A named pipe that is open here as well has no end: an empty line is.
            for commands in self._commands:
                commands.write("\n")
        for commands in self._commands:
            with contextlib.suppress(BrokenPipeError):
                commands.close()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for worker in self._workers:
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    worker.stdin.close()
        for reader in self._readers:
            reader.join(STOP_TIMEOUT_S)
        self._folder.cleanup()
