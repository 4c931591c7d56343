"""Threads that share the pieces of one task with whoever gave it.

The caller works too: it takes pieces like every helper, and finishes alone when all helpers are busy elsewhere, so that
no task waits for another. Helpers are started when they are first needed, end with their owner, and are left behind by
a fork: a forked child starts its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from weakref import WeakSet

import numpy as np

from sparkle_mesh.errors import KernelStoppedError


class Portions:
    """The numbers of a task's pieces, each given to one of the threads that share it."""

    def __init__(self, count: int, should_stop: Callable[[], object] | None) -> None:
        self._count, self._should_stop = count, should_stop
        self._next = 0
        self._lock = threading.Lock()
        self._owner = threading.get_ident()
        self._stopped = False

    def __iter__(self) -> Iterator[int]:
        while True:
            self.check()
            with self._lock:
                number = self._next
                self._next += 1
            if number >= self._count:
                return
            yield number

    def check(self) -> None:
        """Raise KernelStoppedError if the task is given up; only the caller's thread asks whether it should be."""
        ask = self._should_stop
        if ask is not None and threading.get_ident() == self._owner and ask():
            self.stop()
        if self._stopped:
            raise KernelStoppedError("this kernel was stopped before its end; its outputs are not to be used")

    def stop(self) -> None:
        """Let every thread end after the piece that it is at."""
        self._stopped = True


class WorkerThreads:
    """A pool of ``count - 1`` threads beside the callers' own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        _ALL.add(self)

    def share(
        self,
        count: int,
        work: Callable[[Portions], None],
        *,
        alone: bool = False,
        should_stop: Callable[[], object] | None = None,
    ) -> None:
        """Do a task of ``count`` pieces: ``work`` is called in several threads, and takes numbers of pieces.

        NumPy's warnings are silent in the helpers; see :func:`silently` for the caller.

        Parameters
        ----------
        alone
            Whether the task is too small to be shared.
        should_stop
            Asked in the caller's thread before each piece; the task is given up once it returns something true.

        Raises
        ------
        KernelStoppedError
            If the task was given up.
        BaseException
            Whatever ``work`` raised, in any thread; no thread works on the task any more.
        """
        portions = Portions(count, should_stop)
        if alone or self.count == 1 or count <= 1:
            work(portions)
            return
        helpers = min(self.count, count) - 1
        futures = [future for _ in range(helpers) if (future := self._submit(work, portions)) is not None]
        try:
            _work_quietly(work, portions)
        except KernelStoppedError:
            # Another thread's failure, if there is one, is why.
            _wait_for_all(portions, futures)
            _raise_failure(futures)
            raise
        finally:
            _wait_for_all(portions, futures)
        _raise_failure(futures)

    def _submit(self, work: Callable[[Portions], None], portions: Portions) -> Future[None] | None:
        try:
            with self._lock:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self.count - 1, thread_name_prefix="sparkle-kernels")
                return self._pool.submit(_work_quietly, work, portions)
        except RuntimeError:
            # The interpreter is ending, or can start no thread more: the caller does all of it.
            return None

    def close(self) -> None:
        """End the threads, after what they are at. A later task starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def forget(self) -> None:
        """In a forked child, which has none of its parent's threads: start new ones when needed."""
        self._lock, self._pool = threading.Lock(), None


def _wait_for_all(portions: Portions, futures: Sequence[Future[None]]) -> None:
    """Return when no thread works any more, however often this thread is interrupted; raises the last interruption."""
    interruption: BaseException | None = None
    # Those that have not begun have nothing left to do.
    running = [future for future in futures if not future.cancel()]
    while True:
        try:
            wait(running)
            break
        except KeyboardInterrupt as error:
            portions.stop()
            interruption = error
    if interruption is not None:
        raise interruption


def _raise_failure(futures: Sequence[Future[None]]) -> None:
    """Raise what a thread failed with, if one did for another reason than that the task was given up."""
    ended = [future for future in futures if not future.cancelled()]
    failures = [failure for future in ended if (failure := future.exception()) is not None]
    causes = [failure for failure in failures if not isinstance(failure, KernelStoppedError)]
    if failures:
        raise [*causes, *failures][0]


def _work_quietly(work: Callable[[Portions], None], portions: Portions) -> None:
    """Run ``work``; if it fails, all others end as well."""
    finished = False
    try:
        with silently():
            work(portions)
        finished = True
    finally:
        if not finished:
            portions.stop()


def silently() -> AbstractContextManager[object]:
    """Let NumPy not warn of overflows and the like, in this thread: it keeps these settings for each by itself."""
    return np.errstate(all="ignore")


def _forget_threads() -> None:
    for workers in _ALL:
        workers.forget()


_ALL: WeakSet[WorkerThreads] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
