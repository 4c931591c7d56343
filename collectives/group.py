"""Collectives among the ranks of one view.

Every call is one *operation*, numbered alike on every rank. A rank tells all others what it has called and starts to
send without waiting for them; it takes the result only once all ranks hold it with the same digest. Until then the
caller's arrays are as they were, so that any failure leaves them untouched on the ranks that raise.

How an operation ends:

- all ranks called the same and hold the same bytes: it returns, on every rank;
- ranks called different things: `MismatchError`, with the same text on every rank; the next call works again;
- a rank gave up (cancelled, out of time) before it held the result: that rank raises its own error and every other
  rank `CollectiveAbortedError`, at once; the next call works again;
- a rank was lost: `PeerLostError` on every rank, now and for every later call: this group has ended;
- a rank gave up after it held the result, when the others may have returned with it already: it cannot know, so it
  leaves (`OutcomeUnknownError`), and the others find it lost.

A rank that dies just as the last confirmations are on their way can leave some ranks with the result and others with
`PeerLostError`; all of them find the group ended at the next call.

Calls from several tasks take turns in the order in which they were made.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import trio

from sparkle_mesh.collectives.agreement import Agreement
from sparkle_mesh.collectives.arrays import Bucket
from sparkle_mesh.collectives.call_identity import SHARED
from sparkle_mesh.collectives.calls import (
    Call,
    all_reduce_call,
    barrier_call,
    broadcast_call,
    check_timeout,
    reduce_call,
)
from sparkle_mesh.collectives.compression import Compression
from sparkle_mesh.collectives.executor import Execution, Lane
from sparkle_mesh.collectives.explanation import Explanation, explain
from sparkle_mesh.collectives.form import Form
from sparkle_mesh.collectives.group_state import GroupState
from sparkle_mesh.collectives.host_path import HostPath
from sparkle_mesh.collectives.messages import Begin
from sparkle_mesh.collectives.operation import Operation, Outcome
from sparkle_mesh.collectives.parts_call import PartsCall, parts_call
from sparkle_mesh.collectives.quick import QuickCall
from sparkle_mesh.collectives.reduction import Array, Reduction, work_dtype
from sparkle_mesh.collectives.shared import Setback
from sparkle_mesh.errors import (
    CollectiveTimeoutError,
    MeshClosedError,
    UsageError,
)

__all__ = ["CollectiveGroup", "Outcome"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CollectiveGroup(GroupState):
    """The ranks of one view, and this one among them; see :class:`GroupState` for its parameters.

    Notes
    -----
    :meth:`run` must be running for anything but a group of one. Nothing here is for more than one thread, but what
    says so.
    """

    # --- What callers use ------------------------------------------------------------------------

    async def all_reduce(
        self,
        data: T,
        op: str = "sum",
        *,
        algorithm: str = "auto",
        compression: str | Compression | None = None,
        timeout_s: float | None = None,
    ) -> T:
        """Combine the arrays of all ranks, element by element; every rank ends with the same bits. Returns ``data``.

        Parameters
        ----------
        data
            What :mod:`.arrays` accepts; the same shapes, dtypes and keys on every rank. Reduced in place.
        op
            ``"sum"`` or ``"mean"``.
        algorithm
            ``"auto"``, ``"shared"`` (if all ranks share memory), or one of ``cost.ALL_REDUCE_ALGORITHMS``.
        compression
            None; a codec's name, or a :class:`Compression`; or ``"auto"``.
        timeout_s
            How long to wait for the other ranks; ``limits.COLLECTIVE_TIMEOUT_S`` if None.

        Raises
        ------
        UsageError
            For data, an op, an algorithm or a timeout that cannot be. The call counts all the same: on ranks where it
            can be made it raises CollectiveAbortedError, so that the next call is the same one everywhere.
        MismatchError, DivergenceError, CollectiveTimeoutError, CollectiveAbortedError, PeerLostError,
        OutcomeUnknownError, MeshClosedError
            See the module's text. The arrays are as they were.
        """
        async with self._refusals("all_reduce"):
            call, deadline_s = (
                all_reduce_call(data, op, algorithm, self.topology, compression),
                check_timeout(timeout_s),
            )
        await self.perform(call, deadline_s)
        return data

    async def broadcast(self, data: T, root: int = 0, *, timeout_s: float | None = None) -> T:
        """Overwrite the arrays of all ranks with those of ``root``.

        Parameters and errors are as for :meth:`all_reduce`; the root's own arrays may be read-only.
        """
        async with self._refusals("broadcast"):
            call, deadline_s = broadcast_call(data, root, self.rank, self.topology), check_timeout(timeout_s)
        await self.perform(call, deadline_s)
        return data

    async def reduce(self, data: T, op: str = "sum", root: int = 0, *, timeout_s: float | None = None) -> T:
        """Combine the arrays of all ranks in those of ``root``; the others' stay as they are.

        Parameters and errors are as for :meth:`all_reduce`; arrays of ranks other than the root may be read-only.
        """
        async with self._refusals("reduce"):
            call, deadline_s = reduce_call(data, op, root, self.rank, self.topology), check_timeout(timeout_s)
        await self.perform(call, deadline_s)
        return data

    async def reduce_scatter(self, data: Any, op: str = "sum", *, timeout_s: float | None = None) -> Any:
        """Combine the arrays of all ranks; return this rank's part of each: new arrays.

        Every array is split along its first axis as :func:`numpy.array_split` does. Errors as :meth:`all_reduce`.
        """
        return await self._parts("reduce_scatter", data, timeout_s, op=op)

    async def all_gather(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Return, for every array of shape ``(…)``, a new one of shape ``(size, …)``: those of all ranks.

        Errors are as for :meth:`all_reduce`.
        """
        return await self._parts("all_gather", data, timeout_s)

    async def gather(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Return at ``root`` what :meth:`all_gather` does, and None in each array's place elsewhere."""
        return await self._parts("gather", data, timeout_s, root=root)

    async def scatter(self, data: Any, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """Give each rank its row of the arrays of ``root``.

        At ``root`` arrays are of shape ``(size, …)``, and its own rows are returned as views; elsewhere they are of
        shape ``(…)``, are filled, and are returned. Errors are as for :meth:`all_reduce`.
        """
        return await self._parts("scatter", data, timeout_s, root=root)

    async def all_to_all(self, data: Any, *, timeout_s: float | None = None) -> Any:
        """Give row ``r`` of each array of shape ``(size, …)`` to rank ``r``; return new ones: row ``r`` is from ``r``.

        Errors are as for :meth:`all_reduce`.
        """
        return await self._parts("all_to_all", data, timeout_s)

    async def _parts(
        self, kind: str, data: Any, timeout_s: float | None, *, op: str = "sum", root: object = None
    ) -> Any:
        async with self._refusals(kind):
            call = parts_call(kind, data, self.rank, self.size, op=op, root=root)
            deadline_s = check_timeout(timeout_s)
        result = call.result((await self.perform(call, deadline_s)).lanes)
        # What was given is what is filled.
        return data if kind == "scatter" and self.rank != call.root else result

    async def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return once every rank has called it. Errors are as for :meth:`all_reduce`."""
        async with self._refusals("barrier"):
            deadline_s = check_timeout(timeout_s)
        await self.perform(barrier_call(), deadline_s)

    def explain(self, nbytes: int) -> Explanation:
        """Return what an all-reduce of ``nbytes`` would do, and why. Raises UsageError."""
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
            raise UsageError(f"nbytes is {nbytes!r}; give the size of an array in bytes, such as array.nbytes")
        return explain(nbytes, self.topology, shared=self._host is not None and self._host.ready)

    # --- What the owner uses ---------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the links until cancelled; calls need it running.

        Raises
        ------
        UsageError
            If it was run before.
        """
        if self._ran:
            raise UsageError("run() of a collective group can be called once")
        self._ran = True
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for exchange in self._exchanges.values():
                    nursery.start_soon(self._serve, exchange, exchange.read)
                    nursery.start_soon(self._serve, exchange, exchange.write)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            if self._host is not None:
                self._host.close()
            self._end(MeshClosedError("the mesh was left while the collective was in flight"))

    def close(self) -> None:
        """Let the operation in flight and all later calls raise MeshClosedError; the links are their owner's."""
        self._end(MeshClosedError("the mesh was closed"))

    # --- One operation ---------------------------------------------------------------------------

    async def perform(self, call: Call | PartsCall, timeout_s: float) -> Operation:
        """Carry out ``call`` in its turn."""
        started = trio.current_time()
        operation: Operation | None = None
        with trio.move_on_after(timeout_s) as scope:
            async with self._turn:
                await self.gate.enter()
                try:
                    host = self._host if self._host is not None and self._host.takes(call) else None
                    operation = self._start(call, host if host is not None and await host.agreed() else None)
                    await self._carry_out(operation, host, scope, timeout_s)
                finally:
                    self.gate.leave()
        if operation is None:
            raise CollectiveTimeoutError(
                f"{call.describe()} did not start in {timeout_s:g} s: calls take turns, and an earlier one took longer"
            )
        self._tell(operation, call, trio.current_time() - started)
        return operation

    async def _carry_out(
        self,
        operation: Operation,
        host: HostPath | None,
        scope: trio.CancelScope,
        timeout_s: float,
        setback: Setback | None = None,
    ) -> None:
        try:
            if setback is not None and host is not None:
                await host.settle(operation, setback)
            elif operation.one_sided and host is not None:
                await host.run(operation)
            await operation.finished.wait()
        except BaseException as stop:
            if not operation.finished.is_set():
                timed_out = isinstance(stop, trio.Cancelled) and trio.current_time() >= scope.deadline
                self._give_up(operation, f"in {timeout_s:g} s" if timed_out else None)
            raise
        finally:
            self._finish(operation)

    def _tell(self, operation: Operation, call: Call | PartsCall, seconds: float) -> None:
        if operation.failure is not None:
            raise operation.failure
        self.last_outcome = operation.outcome(call, self.size, seconds)

    def _start(self, call: Call | PartsCall, host: HostPath | None) -> Operation:
        if self._ended is not None:
            raise type(self._ended)(str(self._ended))
        if self._nursery is None and self.size > 1:
            raise UsageError("run() of the collective group must be running before its collectives are called")
        # First whatever may fail on this rank alone, such as memory: once it has begun, the others wait for it.
        try:
            buckets, lanes = self._lanes(call) if host is None else (host.stage(call.arrays), [])
        except BaseException as error:
            self._skip(f"its call failed with {type(error).__name__}: {error}")
            raise
        if self.lost:
            self.number += 1
            # Tell the others, who may not have noticed, so that nobody waits for this rank.
            rank = min(self.lost)
            self._post(self._abort_message("lost", lost=rank, reason=self.lost[rank]))
            raise self._lost_error()
        if host is None and self.topology.is_uneven:
            for rank, exchange in self._exchanges.items():
                together = call.algorithm == "butterfly"
                exchange.link.pace(self.topology.pace_bytes_per_s(self.rank, rank) if together else None)
        operation = self._new_operation(call, buckets, lanes, host)
        began, self.next_operation = self.next_operation, trio.Event()
        began.set()
        if host is None:
            self._post(operation.begin)
        self._take_what_came_ahead(operation)
        if host is None:
            self.progress(operation)
        return operation

    def _new_operation(
        self, call: Call | PartsCall, buckets: list[Bucket], lanes: list[Lane], host: HostPath | None
    ) -> Operation:
        number = self.number + 1
        begin = Begin(
            epoch=self.epoch,
            lineage=self.lineage,
            operation=number,
            kind=call.kind,
            digest=call.identity.digest,
            description=call.identity.description,
        )
        execution = Execution(lanes, self.epoch, number)
        agreement = Agreement(self.size, self.rank, begin)
        operation = Operation(begin, agreement, execution, buckets, lanes, one_sided=host is not None)
        if isinstance(call, Call) and call.compression is not None:
            operation.feedback = call.compression.feedback
        self.operation, self.number = operation, number
        if host is not None:
            host.begin(operation, call)
        return operation

    def _take_what_came_ahead(self, operation: Operation) -> None:
        for rank, exchange in self._exchanges.items():
            ahead = exchange.ahead.pop(operation.number, None)
            if ahead is None or operation.finished.is_set():
                continue
            if ahead.begin is not None:
                self.heard(rank, ahead.begin)
            if ahead.abort is not None:
                self.heard(rank, ahead.abort)
            if ahead.data:
                assert self._nursery is not None
                exchange.expect_replay()
                self._nursery.start_soon(self._serve, exchange, exchange.replay, operation, ahead.data)

    # --- Operations that another thread carries out (:mod:`.quick`) -------------------------------

    def quick_all_reduce(self, data: object, op: str, algorithm: str, timeout_s: float | None) -> QuickCall | None:
        """Return the all-reduce as one that the calling thread can carry out; None if :meth:`all_reduce` must."""
        host = self._host
        # What is not one of these may be anything, and fail in any way: that is for the call in its turn.
        plain = type(data) in (np.ndarray, list, tuple, dict)
        if host is None or not host.ready or algorithm not in ("auto", SHARED) or not plain:
            return None
        try:
            call, deadline_s = all_reduce_call(data, op, algorithm, self.topology), check_timeout(timeout_s)
        except UsageError:
            return None
        return QuickCall(self, host, call, deadline_s) if host.takes(call) else None

    def quick_barrier(self, timeout_s: float | None) -> QuickCall | None:
        """Return a barrier likewise."""
        if self._host is None or not self._host.ready:
            return None
        try:
            return QuickCall(self, self._host, barrier_call(), check_timeout(timeout_s))
        except UsageError:
            return None

    def start_quickly(self, call: Call, host: HostPath) -> Operation | None:
        """From any thread that has entered the gate: begin ``call``; None if that needs trio."""
        number = self.number + 1
        if (
            self._ended is not None
            or self.lost
            or self._nursery is None
            or self.next_operation.statistics().tasks_waiting
            or any(number in exchange.ahead for exchange in self._exchanges.values())
        ):
            return None
        try:
            buckets = host.stage(call.arrays)
        except MemoryError:
            # A call that this rank cannot make counts on all: the others must be told.
            return None
        return self._new_operation(call, buckets, [], host)

    def conclude(self, operation: Operation, call: Call, seconds: float) -> None:
        """From the thread that has carried it out: ``operation`` is finished."""
        for exchange in self._exchanges.values():
            exchange.ahead.pop(operation.number, None)
        self._finish(operation)
        self._tell(operation, call, seconds)

    async def adopt(
        self,
        operation: Operation,
        call: Call,
        host: HostPath,
        *,
        timeout_s: float,
        left_s: float,
        setback: Setback | None,
        interrupted: bool,
    ) -> None:
        """Carry on with what another thread has begun, for ``left_s`` of its ``timeout_s``."""
        started = trio.current_time()
        with trio.move_on_after(math.inf if interrupted else left_s) as scope:
            if interrupted:
                scope.cancel()
            # It may have been interrupted anywhere.
            host.begin(operation, call)
            self._take_what_came_ahead(operation)
            await self._carry_out(operation, host, scope, timeout_s, setback)
        if not interrupted:
            self._tell(operation, call, trio.current_time() - started + timeout_s - left_s)

    def _lanes(self, call: Call | PartsCall) -> tuple[list[Any], list[Lane]]:
        if call.algorithm == SHARED:
            raise UsageError("algorithm 'shared' is for ranks that all share memory, on one host; use 'auto'")
        if isinstance(call, PartsCall):
            return [], call.lanes(self._key)
        receiving_only = call.kind == "broadcast" and call.root != self.rank
        buckets = call.arrays.buckets(self._pool.take, fill=not receiving_only)
        return buckets, [self._lane(call, number, bucket) for number, bucket in enumerate(buckets)]

    def _lane(self, call: Call, number: int, bucket: Bucket) -> Lane:
        dtype = work_dtype(bucket.data.dtype)
        compression = call.compression
        feedback = None if compression is None else compression.feedback
        lost: Array | None = None
        if feedback is not None:
            # What was lost is added to a copy, which may be written to.
            given = bucket.data
            bucket.stage(self._pool.take(given.size, dtype))
            with np.errstate(all="ignore"):
                np.add(given, feedback.begin((number, dtype.name), given.size), out=bucket.data)
            lost = np.zeros(given.size, dtype)
        within = bucket.staged and dtype == bucket.data.dtype
        plan = call.plan(self.rank, self.topology, bucket.data.size, bucket.data.dtype.itemsize, within)
        low, high = plan.schedule.work_range
        work = bucket.data if plan.in_place or not plan.schedule.steps else self._pool.take(high - low, dtype)
        form = Form(bucket.data.dtype, None if compression is None else compression.codec)
        return Lane(plan, bucket.data, work, Reduction(call.op, self.size), self._key, form, lost)

    def _finish(self, operation: Operation) -> None:
        self.operation = None
        if self._host is not None:
            self._host.finish(succeeded=operation.succeeded)
        if not operation.succeeded:
            # Links may still be busy with its buffers: they are dropped, not reused.
            return
        operation.commit()
        operation.keep_what_was_lost()
        if operation.one_sided and self._host is not None:
            self._host.give_back(operation.buckets)
            return
        for bucket, lane in zip(operation.buckets, operation.lanes, strict=False):
            if lane.work is not bucket.data:
                self._pool.give(lane.work)
            if bucket.staged:
                self._pool.give(bucket.data)

    # --- Calls that are refused ------------------------------------------------------------------

    @asynccontextmanager
    async def _refusals(self, kind: str) -> AsyncIterator[None]:
        """Let a call that is refused within the block count in its turn, here and on all other ranks."""
        try:
            yield
        except Exception as error:
            # Whatever it is: the others make the call that this rank does not.
            async with self._turn:
                self._skip(f"its {kind} was refused: {error}")
            raise

    def _skip(self, reason: str) -> None:
        """The next operation is none on this rank: tell the others, who may have begun it or will."""
        if self._ended is not None or self.lost or self._nursery is None:
            return
        self.number += 1
        for exchange in self._exchanges.values():
            exchange.ahead.pop(self.number, None)
        began, self.next_operation = self.next_operation, trio.Event()
        began.set()
        self._post(self._abort_message("refused", reason=reason))
