"""A trio run in a background thread, and calls into it from ordinary threads.

A call waits for its result in a way that Ctrl-C interrupts: the call is then cancelled inside the run, its
end is awaited for a bounded time, and KeyboardInterrupt goes on to the caller.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar, TypeVarTuple

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.errors import MeshClosedError
from sparkle_mesh.nurseries import bare_errors, is_cancellation

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Portal:
    """Holds an async context manager open in a trio run of its own thread.

    Parameters
    ----------
    name
        The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._manager: Callable[[], AbstractAsyncContextManager[Any]] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._started: Future[None] = Future()
        self._opened: Future[Any] = Future()
        self._finished: Future[None] = Future()
        self._stop = trio.Event()
        self._failure: BaseException | None = None
        self._begun = False

    def open(self, manager: Callable[[], AbstractAsyncContextManager[T]]) -> T:
        """Start the thread, enter ``manager()`` in it, and return what it yields.

        Raises
        ------
        BaseException
            What entering raised; the thread has ended then.
        """
        self._manager = manager
        self._begun = True
        try:
            # Ctrl-C may come out of start() with the thread on its way all the same.
            self._thread.start()
            _wait(self._opened)
            opened: T = self._opened.result()
        except BaseException:
            self.close(hurry=True)
            raise
        return opened

    def call(
        self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, on_look: Callable[[], object] | None = None
    ) -> T:
        """Run ``await function(*args)`` in the trio run and return its result.

        ``on_look`` is called in this thread now and then meanwhile.

        Raises
        ------
        MeshClosedError
            If the run has ended, or ends meanwhile.
        BaseException
            What ``function`` raised.
        """
        future: Future[T] = Future()
        scope = trio.CancelScope()
        torn_down = False

        async def task() -> None:
            nonlocal torn_down
            with bare_errors(), scope:
                try:
                    future.set_result(await function(*args))
                except BaseException as error:
                    if not is_cancellation(error):
                        future.set_exception(error)
                        return
                    torn_down = not (scope.cancel_called or self._stop.is_set() or self._scope.cancel_called)
                    future.set_exception(MeshClosedError("the mesh was closed while the call ran; join again to go on"))
                    raise

        def start() -> None:
            if self._nursery is None:
                future.set_exception(self._closed_error())
            else:
                self._nursery.start_soon(task)

        try:
            self._soon(start)
            while on_look is not None and not future.done():
                _wait(future, limits.PROGRESS_INTERVAL_S)
                on_look()
            _wait(future)
            return future.result()
        except MeshClosedError:
            if torn_down:
                # The whole run ends with an error: that is what the caller must know.
                _wait(self._finished, limits.CLOSE_TIMEOUT_S)
                raise self._closed_error() from self._failure
            raise
        except BaseException:
            # Interrupted here, not failed there, nor never begun because it is closed.
            if not future.done():
                self._soon(scope.cancel, quietly=True)
                _wait(future, limits.CLOSE_TIMEOUT_S)
            raise

    def close(self, *, hurry: bool = False) -> None:
        """Leave the context manager and end the thread.

        A first Ctrl-C meanwhile turns a graceful close into a hurried one and is raised again at the end.
        """
        if not self._begun:
            return
        interrupt: BaseException | None = None
        try:
            _wait(self._started, limits.CLOSE_TIMEOUT_S)
            self._soon(self._scope.cancel if hurry else self._stop.set, quietly=True)
            _wait(self._finished, limits.MESH_CLOSE_TIMEOUT_S)
        except KeyboardInterrupt as error:
            interrupt = error
        if not self._finished.done():
            self._soon(self._scope.cancel, quietly=True)
            _wait(self._finished, limits.MESH_CLOSE_TIMEOUT_S)
        if self._thread.ident is not None:
            self._thread.join(limits.CLOSE_TIMEOUT_S)
        if interrupt is not None:
            raise interrupt

    def _soon(self, function: Callable[[], object], *, quietly: bool = False) -> None:
        token = self._token
        try:
            if token is None:
                raise trio.RunFinishedError
            token.run_sync_soon(function)
        except trio.RunFinishedError as error:
            if not quietly:
                raise self._closed_error() from error

    def _closed_error(self) -> MeshClosedError:
        why = f" (it ended with {type(self._failure).__name__}: {self._failure})" if self._failure is not None else ""
        return MeshClosedError(f"the mesh is closed{why}; join again")

    # --- In the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # handed to whoever waits; a thread has nobody else to tell
            self._failure = error
        finally:
            self._started.cancel()
            if not self._opened.done():
                self._opened.set_exception(self._failure or MeshClosedError("closed while it was being opened"))
            self._finished.set_result(None)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._started.set_result(None)
        assert self._manager is not None
        with bare_errors(), self._scope:
            async with self._manager() as opened, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._opened.set_result(opened)
                try:
                    await self._stop.wait()
                finally:
                    self._nursery = None
                    nursery.cancel_scope.cancel()


def _wait(future: Future[Any], timeout_s: float = math.inf) -> None:
    """Wait for ``future`` to be done, whatever it holds, no longer than ``timeout_s``.

    In slices: a Ctrl-C that comes just before the thread begins to wait interrupts nothing (and on Windows none
    interrupts a wait), so that Python has to be given the chance to look for one now and then.
    """
    deadline = SYSTEM_CLOCK.now() + timeout_s
    while not future.done() and (left_s := deadline - SYSTEM_CLOCK.now()) > 0:
        with suppress(FutureTimeoutError, CancelledError):
            future.exception(min(left_s, limits.SIGNAL_LOOK_INTERVAL_S))
