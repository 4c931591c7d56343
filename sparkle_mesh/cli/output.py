"""Where a node's lines go. A reader that stops reading, or goes away, never holds the node up.

Each stream has a thread that writes what a bounded queue holds; what does not fit is dropped and counted, so
that a paused terminal or a full pipe costs lines and not heartbeats.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, TypeAlias

from sparkle_mesh import limits
from sparkle_mesh.cli.render import Line, dropped_lines, log_line
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock

LogFormat: TypeAlias = Literal["text", "json"]


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own.

    Parameters
    ----------
    descriptor
        Written to without buffering; not closed.
    notice
        Makes the line that says how many were dropped.
    on_broken
        Called once, from the thread, if nobody can read any more.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        notice: Callable[[int], str],
        on_broken: Callable[[], None] = lambda: None,
        capacity: int = limits.OUTPUT_LINES_MAX_COUNT,
    ) -> None:
        self._descriptor, self._notice, self._on_broken = descriptor, notice, on_broken
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._dropped_count = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write_all, name=f"sparkle output {descriptor}", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue one line, or drop it if the queue is full; never waits. For any thread."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            with self._lock:
                self._dropped_count += 1

    def close(self, *, timeout_s: float = limits.OUTPUT_FLUSH_TIMEOUT_S) -> None:
        """Write what is queued, for at most ``timeout_s``, and end the thread."""
        deadline = SYSTEM_CLOCK.now() + timeout_s
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(max(deadline - SYSTEM_CLOCK.now(), 0))

    def _write_all(self) -> None:
        broken = False
        while True:
            line = self._lines.get()
            with self._lock:
                dropped_count, self._dropped_count = self._dropped_count, 0
            text = (f"{line}\n" if line is not None else "") + (
                f"{self._notice(dropped_count)}\n" if dropped_count else ""
            )
            if not broken:
                try:
                    self._write(text.encode("utf-8", errors="backslashreplace"))
                except OSError:
                    broken = True
                    self._on_broken()
            if line is None:
                return

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                # Somebody who shares this terminal or pipe made it non-blocking.
                select.select([], [self._descriptor], [])


class Reporter:
    """Turns a node's lines into text or JSON, on stdout, and its log and errors on stderr.

    Parameters
    ----------
    on_broken
        Called, from another thread, when nobody can read stdout any more.
    """

    def __init__(
        self,
        log_format: LogFormat,
        *,
        stdout: int,
        stderr: int,
        on_broken: Callable[[], None] = lambda: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._format, self._clock = log_format, clock

        def notice(count: int) -> str:
            return self._render(dropped_lines(count))

        self._out = LineWriter(stdout, notice=notice, on_broken=on_broken)
        self._err = LineWriter(stderr, notice=notice)

    def say(self, line: Line) -> None:
        """Print on stdout."""
        self._out.write(self._render(line))

    def complain(self, line: Line) -> None:
        """Print on stderr."""
        self._err.write(self._render(line))

    def close(self) -> None:
        """Print what is still to be printed, within ``limits.OUTPUT_FLUSH_TIMEOUT_S``."""
        self._out.close()
        self._err.close()

    def _render(self, line: Line) -> str:
        now = self._clock.wall_time()
        if self._format == "json":
            return line.to_json(now)
        return line.to_text(datetime.fromtimestamp(now).strftime("%H:%M:%S"))


class LogToReporter(logging.Handler):
    """Passes log records on as lines."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.complain(log_line(record.levelname.lower(), record.name, self.format(record)))


def start_logging(reporter: Reporter, level: str) -> Callable[[], None]:
    """Send the log and Python's warnings to ``reporter``; return what undoes it.

    ``level`` is for Sparkle's own loggers; of others only warnings and worse are shown. py-libp2p warns of what honest
    peers do all the time (asking for more gossip than it likes, say): it is shown where everything is.
    """
    handler = LogToReporter(reporter)
    root, own, library = logging.getLogger(), logging.getLogger("sparkle_mesh"), logging.getLogger("libp2p")
    before: list[Any] = [root.level, own.level, library.level]
    library.setLevel(logging.WARNING if level == "debug" else logging.CRITICAL)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    own.setLevel(level.upper())
    logging.captureWarnings(True)

    def stop() -> None:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(before[0])
        own.setLevel(before[1])
        library.setLevel(before[2])

    return stop
