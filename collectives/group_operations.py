"""Carries out the calls of one rank of a group: from their turn, by whichever way they go, to their end."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any, Final

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.agreement import Agreement
from sparkle_mesh.collectives.arrays import Bucket
from sparkle_mesh.collectives.call_identity import SHARED
from sparkle_mesh.collectives.calls import (
    Call,
    all_reduce_call,
    barrier_call,
    check_timeout,
)
from sparkle_mesh.collectives.compression import can_be_compressed
from sparkle_mesh.collectives.executor import Execution, Lane
from sparkle_mesh.collectives.form import Form
from sparkle_mesh.collectives.group_state import GroupState
from sparkle_mesh.collectives.host_path import HostPath
from sparkle_mesh.collectives.messages import Begin, Stream
from sparkle_mesh.collectives.operation import Operation
from sparkle_mesh.collectives.parts_call import PartsCall
from sparkle_mesh.collectives.quick import QuickCall
from sparkle_mesh.collectives.reduction import Array, Reduction, work_dtype
from sparkle_mesh.collectives.shared import Setback
from sparkle_mesh.collectives.tickets import Queue, Ticket
from sparkle_mesh.errors import (
    CollectiveTimeoutError,
    ProtocolError,
    UsageError,
)

#: The calls among all ranks that have no tag.
ALL: Final = Stream()


class GroupOperations(GroupState):
    """A rank's operations: how they begin, and how they end."""

    # --- One operation ---------------------------------------------------------------------------

    async def perform(
        self,
        call: Call | PartsCall,
        timeout_s: float,
        stream: Stream = ALL,
        started: Callable[[Operation], None] | None = None,
        ticket: Ticket | None = None,
    ) -> Operation:
        """Carry out ``call`` in its turn, which comes when all calls of its stream before it have begun.

        ``started`` is called with the operation when that has begun. The turn is that of ``ticket``, or the next.
        """
        ticket = ticket or self.take_turn(stream)
        called_at = trio.current_time()
        operation: Operation | None = None
        with ExitStack() as held:
            with trio.move_on_after(timeout_s) as scope:
                try:
                    host = await self._come_to_turn(call, stream, ticket, held)
                except trio.Cancelled:
                    self._abandon(stream, ticket)
                    raise
                try:
                    operation = self._start(call, host, stream)
                finally:
                    ticket.leave()
                if started is not None:
                    started(operation)
                await self._carry_out(operation, host, scope, timeout_s)
        if operation is None:
            raise CollectiveTimeoutError(
                f"{call.describe()} did not start in {timeout_s:g} s: calls take turns, and an earlier one took longer"
            )
        self._tell(operation, call, trio.current_time() - called_at)
        return operation

    async def _come_to_turn(
        self, call: Call | PartsCall, stream: Stream, ticket: Ticket, held: ExitStack
    ) -> HostPath | None:
        """Wait for all that ``call`` needs to begin, kept by ``held``; return the host path if it goes that way."""
        await ticket.wait()
        slots = self._slots if stream == ALL else self._unordered_slots
        await _acquire(slots)
        held.callback(slots.release)
        host = self._host if stream == ALL and self._host is not None and self._host.takes(call) else None
        if host is not None and await host.agreed():
            await _acquire(self._host_turn)
            held.callback(self._host_turn.release)
        else:
            host = None
        await self._enter()
        held.callback(self._leave)
        return host

    def _abandon(self, stream: Stream, ticket: Ticket) -> None:
        """A call is given up that has not begun: it counts all the same, because the others make it."""

        async def skip() -> None:
            await ticket.wait()
            self._skip("its call was given up before it began", stream)
            ticket.leave()

        if self._nursery is not None:
            self._nursery.start_soon(skip)

    async def _enter(self) -> None:
        """Keep threads from carrying out calls by themselves until :meth:`_leave`; any number of tasks may be in."""
        await _acquire(self._gate_turn)
        try:
            if not self._inside_count:
                await self.gate.enter()
            self._inside_count += 1
        finally:
            self._gate_turn.release()

    def _leave(self) -> None:
        self._inside_count -= 1
        if not self._inside_count:
            self.gate.leave()

    def take_turn(self, stream: Stream) -> Ticket:
        """Return the next place among a stream's calls. Raises UsageError for a tag too many, or like another."""
        if stream not in self._queues:
            tag = stream.tag
            if len(self._queues) >= limits.COLLECTIVE_STREAMS_MAX_COUNT:
                raise UsageError(f"tag {tag!r} is one too many: {len(self._queues)} were used; use the same ones again")
            same = next((other for other in self._queues if other.number == stream.number), None)
            if same is not None:
                raise UsageError(f"tag {tag!r} has the same checksum as calls {same}; choose another")
            self._queues[stream] = Queue()
        return self._queues[stream].take()

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
        self.last_outcome = operation.ended_with = operation.outcome(call, self.size, seconds)

    def _start(self, call: Call | PartsCall, host: HostPath | None, stream: Stream) -> Operation:
        if self._ended is not None:
            raise type(self._ended)(str(self._ended))
        if self._nursery is None and self.size > 1:
            raise UsageError("run() of the collective group must be running before its collectives are called")
        # First whatever may fail on this rank alone, such as memory: once it has begun, the others wait for it.
        try:
            buckets, lanes = self._lanes(call) if host is None else (host.stage(call.arrays), [])
        except BaseException as error:
            self._skip(f"its call failed with {type(error).__name__}: {error}", stream)
            raise
        if self.lost:
            number = self._next_number(stream)
            # Tell the others, who may not have noticed, so that nobody waits for this rank.
            rank = min(self.lost)
            message = self._abort_message(number, "lost", lost=rank, reason=self.lost[rank])
            self._post(message, stream.ranks(self.size))
            raise self._lost_error()
        if host is None and self.topology.is_uneven:
            for rank, exchange in self._exchanges.items():
                together = call.algorithm == "butterfly"
                exchange.link.pace(self.topology.pace_bytes_per_s(self.rank, rank) if together else None)
        operation = self._new_operation(call, buckets, lanes, host, stream)
        began, self.next_operation = self.next_operation, trio.Event()
        began.set()
        if host is None:
            self._post(operation.begin, operation.agreement.ranks)
        self._take_what_came_ahead(operation)
        if host is None:
            self.progress(operation)
        return operation

    def _new_operation(
        self,
        call: Call | PartsCall,
        buckets: list[Bucket],
        lanes: list[Lane],
        host: HostPath | None,
        stream: Stream = ALL,
    ) -> Operation:
        number = stream.operation(self._streams.get(stream.number, 0) + 1)
        identity = call.identity
        begin = Begin(
            epoch=self.epoch,
            lineage=self.lineage,
            operation=number,
            tag=stream.tag,
            kind=call.kind,
            digest=identity.digest,
            description=identity.description,
        )
        execution = Execution(lanes, self.epoch, number)
        agreement = Agreement(stream.ranks(self.size), self.rank, begin)
        operation = Operation(begin, agreement, execution, buckets, lanes, one_sided=host is not None)
        if isinstance(call, Call) and call.compression is not None:
            operation.feedback = call.compression.feedback
        # A thread may be interrupted anywhere here: who finds what is hosted does the rest again.
        if host is not None:
            self.hosted = operation
        self._register(operation)
        if host is not None:
            host.begin(operation, call)
        return operation

    def _next_number(self, stream: Stream) -> int:
        """Count one more operation of a stream, which is none on this rank; return its number."""
        self._streams[stream.number] = self._streams.get(stream.number, 0) + 1
        return stream.operation(self._streams[stream.number])

    def _take_what_came_ahead(self, operation: Operation) -> None:
        for rank, exchange in self._exchanges.items():
            ahead = exchange.ahead.pop(operation.number, None)
            if ahead is None or operation.finished.is_set():
                continue
            try:
                if ahead.begin is not None:
                    self.heard(rank, ahead.begin)
                if ahead.abort is not None:
                    self.heard(rank, ahead.abort)
                exchange.hold_all(operation, ahead.data)
            except ProtocolError as error:
                self._broke_protocol(exchange, error)

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
            or self._queues[ALL].busy
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
            self._register(operation)
            host.begin(operation, call)
            self._take_what_came_ahead(operation)
            await self._carry_out(operation, host, scope, timeout_s, setback)
        if not interrupted:
            self._tell(operation, call, trio.current_time() - started + timeout_s - left_s)

    def _lanes(self, call: Call | PartsCall) -> tuple[list[Any], list[Lane]]:
        if call.algorithm == SHARED:
            raise UsageError("algorithm 'shared' is for ranks that all share memory, on one host; use 'auto'")
        if isinstance(call, PartsCall):
            return call.lanes(self._key, self._pool.take)
        receiving_only = call.kind == "broadcast" and call.root != self.rank
        buckets = call.arrays.buckets(self._pool.take, fill=not receiving_only)
        return buckets, [self._lane(call, number, bucket) for number, bucket in enumerate(buckets)]

    def _lane(self, call: Call, number: int, bucket: Bucket) -> Lane:
        dtype = work_dtype(bucket.data.dtype)
        compression = call.compression if can_be_compressed(bucket.data.dtype) else None
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
        self.operations.pop(operation.number, None)
        if operation is self.hosted and self._host is not None:
            self.hosted = None
            self._host.finish()
        if self._host is not None and operation.succeeded:
            self._host.succeeded()
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
    async def _refusals(self, kind: str, stream: Stream = ALL, ticket: Ticket | None = None) -> AsyncIterator[None]:
        """Let a call that is refused within the block count in its turn, here and on all other ranks."""
        try:
            yield
        except Exception as error:
            # Whatever it is: the others make the call that this rank does not.
            ticket = ticket or self.take_turn(stream)
            try:
                await ticket.wait()
                self._skip(f"its {kind} was refused: {error}", stream)
            finally:
                ticket.leave()
            raise

    async def refuse(self, kind: str, reason: str) -> None:
        """Let the next call of the others fail with ``reason``, and raise it as UsageError."""
        async with self._refusals(kind):
            raise UsageError(reason)

    def _skip(self, reason: str, stream: Stream) -> None:
        """The next operation is none on this rank: tell the others, who may have begun it or will."""
        if self._ended is not None or self.lost or self._nursery is None:
            return
        number = self._next_number(stream)
        for exchange in self._exchanges.values():
            exchange.ahead.pop(number, None)
        began, self.next_operation = self.next_operation, trio.Event()
        began.set()
        self._post(self._abort_message(number, "refused", reason=reason), stream.ranks(self.size))


async def _acquire(what: trio.Lock | trio.Semaphore) -> None:
    """Acquire ``what``; where nobody has it that is no checkpoint, because a call that is made should begin."""
    try:
        what.acquire_nowait()
    except trio.WouldBlock:
        await what.acquire()
