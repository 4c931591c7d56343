"""A reduction that goes on while its caller does something else."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from sparkle_mesh.collectives.operation import Operation, Outcome
from sparkle_mesh.errors import CollectiveTimeoutError, MeshClosedError

_log = logging.getLogger(__name__)

D = TypeVar("D")


class AsyncPendingReduction(Generic[D]):
    """A reduction in flight, for trio programs; made by ``all_reduce_async``. Its arrays are not to be touched.

    Attributes
    ----------
    outcome
        How it went; None until it has succeeded.
    """

    def __init__(self, data: D, description: str, give_up: Callable[[Operation], None]) -> None:
        self.outcome: Outcome | None = None
        self._description = description
        self._give_up = give_up
        self._cancelled = False
        self._operation: Operation | None = None
        self._error: BaseException | None = None
        self._told = False
        self._settle: Callable[[], D] = lambda: data
        self._release: Callable[[], None] = lambda: None
        self._ended = trio.Event()

    def __repr__(self) -> str:
        state = "failed" if self._error is not None else "done" if self.done() else f"{self.progress:.0%} done"
        return f"<reduction, {self._description}, {state}>"

    def __del__(self) -> None:
        if self._error is not None and not self._told:
            _log.warning("nobody waited for %s, which failed: %s", self._description, self._error)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    @property
    def progress(self) -> float:
        """How much of what this rank sends and receives is done, from 0 to 1."""
        if self.done():
            return 1.0
        return 0.0 if self._operation is None else self._operation.execution.progress * 0.99

    @property
    def contributors(self) -> tuple[int, ...]:
        """The ranks whose data is in the result; empty until it has succeeded."""
        return () if self.outcome is None else self.outcome.contributors

    def cancel(self) -> None:
        """Give the reduction up, on all ranks, if it has not gone too far: :meth:`wait` tells how it has ended.

        It raises CollectiveAbortedError on all of them, with their arrays as they were; or, where this rank had its
        whole result already, returns that on all of them. One that has yet to begin is given up in its turn.
        """
        self._cancelled = True
        if self._operation is not None:
            self._give_up(self._operation)

    async def wait(self, timeout_s: float | None = None) -> D:
        """Return the data, which hold the result then.

        Parameters
        ----------
        timeout_s
            How long to wait; until it ends if None. Waiting can be done again.

        Raises
        ------
        CollectiveTimeoutError
            If it has not ended by then; it goes on.
        SparkleError
            Whatever ended it, as ``all_reduce`` raises it.
        """
        if timeout_s is None:
            await self._ended.wait()
        else:
            with trio.move_on_after(timeout_s):
                await self._ended.wait()
        if not self.done():
            raise CollectiveTimeoutError(f"{self._description} has not ended in {timeout_s} s; it goes on: wait again")
        return self.result()

    def result(self) -> D:
        """Return the data of one that has ended, or raise what ended it."""
        if self._error is not None:
            self._told = True
            raise self._error
        return self._settle()

    def gives(self, settle: Callable[[], D]) -> None:
        """Let :meth:`result` return what ``settle`` does, where that is not what was reduced."""
        self._settle = settle

    def releases(self, release: Callable[[], None]) -> None:
        """Call ``release`` as soon as it has failed, whether anybody waits for it or not."""
        self._release = release

    def given_up_by_waiter(self) -> None:
        """Whoever waited was told that the mesh is closed: nobody else need be."""
        self._told = True

    # --- For the group ---------------------------------------------------------------------------

    def begun(self, operation: Operation) -> None:
        """``operation`` carries it out."""
        self._operation = operation
        if self._cancelled:
            self._give_up(operation)

    async def run(self, call: Callable[[], Awaitable[Outcome | None]]) -> None:
        """Carry out ``call``; keep its outcome, or its error for whoever waits."""
        try:
            self.outcome = await call()
        except trio.Cancelled:
            self._error = MeshClosedError(f"the mesh was left while {self._description} was in flight")
            raise
        except Exception as error:
            self._error = error
        finally:
            self._operation = None
            if self._error is not None:
                self._release()
            self._ended.set()
