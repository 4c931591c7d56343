"""Kernels that run in the background, the most urgent first."""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from itertools import count
from typing import Any

from sparkle_mesh import limits
from sparkle_mesh.errors import ClosedError, DeadlineError, ForkedProcessError, KernelStoppedError, UsageError
from sparkle_mesh.kernels.runners import Stop


class PendingRun:
    """One kernel that was submitted."""

    def __init__(self, work: Callable[[Stop], Any]) -> None:
        self._work: Callable[[Stop], Any] | None = work
        self._future: Future[Any] = Future()
        self._cancelled = threading.Event()
        self._process = os.getpid()

    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._future.done()

    def cancel(self) -> None:
        """Give it up: if it runs it stops at the next piece; :meth:`result` raises KernelStoppedError then."""
        self._cancelled.set()

    def result(self, timeout_s: float | None = None) -> Any:
        """Return what the kernel returns, as soon as it is there.

        Raises
        ------
        DeadlineError
            If it is not within ``timeout_s``; it goes on.
        KernelStoppedError
            If it was cancelled before it was done.
        ForkedProcessError
            In a forked child, where nobody computes it.
        """
        if os.getpid() != self._process and not self._future.done():
            raise ForkedProcessError(f"this kernel is computed in process {self._process}; ask for its result there")
        try:
            return self._future.result(timeout_s)
        except FutureTimeoutError as error:
            if self._future.done():
                raise
            raise DeadlineError(f"the kernel was not done after {timeout_s:g} s; it goes on") from error

    def _run(self) -> None:
        # What it computes with is needed no more afterwards, however long somebody keeps the result.
        work, self._work = self._work, None
        assert work is not None
        if self._cancelled.is_set():
            self._future.set_exception(KernelStoppedError("the kernel was cancelled before it ran"))
            return
        # A future carries whatever comes out to who asks for the result.
        carrier: Future[Any] = self._future
        carrier.set_running_or_notify_cancel()
        try:
            result = work(self._cancelled.is_set)
        except BaseException as error:
            carrier.set_exception(error)
        else:
            carrier.set_result(result)


class Submissions:
    """Runs what is submitted, in a few threads that start when they are needed.

    Parameters
    ----------
    threads
        How many at most.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._condition = threading.Condition()
        self._waiting: list[tuple[int, int, PendingRun]] = []
        self._numbers = count()
        self._threads: list[threading.Thread] = []
        self._idle_count = 0
        self._is_closed = False

    def submit(self, work: Callable[[Stop], Any], priority: int) -> PendingRun:
        """Run ``work`` when its turn comes."""
        pending = PendingRun(work)
        with self._condition:
            if self._is_closed:
                raise ClosedError("this context is closed; nothing more is run")
            if len(self._waiting) >= limits.SUBMITTED_MAX_COUNT:
                raise UsageError(f"{len(self._waiting)} kernels wait already; wait for some of them first")
            heapq.heappush(self._waiting, (-priority, next(self._numbers), pending))
            if len(self._waiting) > self._idle_count and len(self._threads) < self.threads:
                thread = threading.Thread(target=self._run, name="sparkle-submitted", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._condition.notify()
        return pending

    def _run(self) -> None:
        while True:
            with self._condition:
                self._idle_count += 1
                self._condition.wait_for(lambda: self._waiting or self._is_closed)
                self._idle_count -= 1
                if not self._waiting:
                    return
                pending = heapq.heappop(self._waiting)[2]
            pending._run()
            # Not until the next one comes: its result may be large.
            del pending

    def close(self) -> None:
        """Wait for what was submitted; nothing more is taken."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
