"""Carries out the calls of one rank of a group: from their turn, by whichever way they go, to their end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.agreement import Agreement
from sparkle_mesh.collectives.arrays import Bucket
from sparkle_mesh.collectives.call_identity import SHARED
from sparkle_mesh.collectives.calls import (
    Call,
)
from sparkle_mesh.collectives.compression import can_be_compressed
from sparkle_mesh.collectives.executor import Execution, Lane
from sparkle_mesh.collectives.form import Form
from sparkle_mesh.collectives.group_state import ALL, GroupState
from sparkle_mesh.collectives.host_path import HostPath
from sparkle_mesh.collectives.ledger import Ledger
from sparkle_mesh.collectives.messages import Begin, Stream
from sparkle_mesh.collectives.operation import Operation, SupersededError
from sparkle_mesh.collectives.parts_call import PartsCall
from sparkle_mesh.collectives.reduction import Array, Reduction, work_dtype
from sparkle_mesh.collectives.shared import Setback
from sparkle_mesh.collectives.tickets import Queue, Ticket
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    PeerLostError,
    ProtocolError,
    SparkleError,
    UsageError,
)


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
        remake: Callable[[], Call | PartsCall] | None = None,
        again: Operation | None = None,
        bound_to: int | None = None,
    ) -> Operation:
        """Carry out ``call`` in its turn, which comes when all calls of its stream before it have begun.

        If its view ends before it does, it begins again in the next. ``started`` is called with the operation whenever
        that has begun. The turn is that of ``ticket``, or the next. ``remake`` returns the call for another view.
        ``again`` is an operation of it that has begun already, in a view that has ended. ``bound_to`` is the only epoch
        in which it may begin: later there is no such call, and PeerLostError is raised.
        """
        if again is None:
            self._check_ended(ticket)
        ticket = ticket or (None if again is not None else self.take_turn(stream))
        called_at = trio.current_time()
        made_in = self.epoch if again is None else again.begin.epoch
        operation = again
        with ExitStack() as held, trio.move_on_after(timeout_s) as scope:
            while operation is None or isinstance(operation.failure, SupersededError):
                number = None if operation is None else operation.number
                with ExitStack() as attempt:
                    try:
                        host = await self._come_to_turn(call, stream, ticket, (held, attempt), number)
                        self._check_epoch(bound_to)
                    except PeerLostError:
                        if ticket is not None:
                            ticket.leave()
                        raise
                    except trio.Cancelled:
                        self._abandon(stream, ticket, number)
                        raise
                    try:
                        if self.epoch != made_in and remake is not None:
                            call, made_in = self._remade(remake, stream, number), self.epoch
                        operation = self._start(call, host, stream, number)
                    finally:
                        if ticket is not None:
                            ticket.leave()
                    if started is not None:
                        started(operation)
                    await self._carry_out(operation, host, scope, timeout_s)
            if isinstance(operation.failure, PeerLostError) and self.supervised:
                # Whoever is told of it finds the next view.
                await self.until_may_begin()
        if operation is None:
            raise CollectiveTimeoutError(
                f"{call.describe()} did not start in {timeout_s:g} s: calls take turns, and an earlier one took longer"
                if self.may_begin(stream)
                else f"{call.describe()} did not start in {timeout_s:g} s: the members did not agree on a view"
            )
        if isinstance(operation.failure, SupersededError):
            raise CollectiveTimeoutError(
                f"{call.describe()} did not end in {timeout_s:g} s: its view ended before, and it was to begin again"
            )
        self._tell(operation, call, trio.current_time() - called_at)
        return operation

    def _check_ended(self, ticket: Ticket | None = None) -> None:
        """Raise what has ended this group, if it has; whoever holds ``ticket`` waits for nothing then."""
        if self._ended is not None:
            if ticket is not None:
                ticket.leave()
            raise type(self._ended)(str(self._ended))

    def _check_epoch(self, epoch: int | None) -> None:
        if epoch is not None and epoch != self.epoch and self._ended is None:
            raise PeerLostError(f"view {epoch}, for which this call was made, has ended before it began")

    def _remade(self, remake: Callable[[], Call | PartsCall], stream: Stream, again: int | None) -> Call | PartsCall:
        """Return the call for this view; if it cannot be made in it, it counts all the same."""
        try:
            return remake()
        except SparkleError as error:
            self._skip(f"its call was refused: {error}", stream, again)
            raise

    async def _come_to_turn(
        self,
        call: Call | PartsCall,
        stream: Stream,
        ticket: Ticket | None,
        stacks: tuple[ExitStack, ExitStack],
        again: int | None,
    ) -> HostPath | None:
        """Wait for all that ``call`` needs to begin; return the host path if it goes that way.

        It is kept by the first of ``stacks`` for all attempts, and by the second for this one.
        """
        held, attempt = stacks
        if again is None and ticket is not None:
            await ticket.wait()
            slots = self._slots if stream == ALL else self._unordered_slots
            await _acquire(slots)
            held.callback(slots.release)
        while True:
            await self.until_may_begin(stream, again)
            host = self._host if stream == ALL and self._ended is None else None
            if host is not None and not host.takes(call):
                host = None
            with ExitStack() as tried:
                if host is not None and await host.agreed():
                    await _acquire(self._host_turn)
                    tried.callback(self._host_turn.release)
                else:
                    host = None
                await self._enter()
                tried.callback(self._leave)
                if self.may_begin(stream, again) and (host is None or host is self._host):
                    attempt.push(tried.pop_all())
                    return host

    def give_up_next(self, reason: str) -> None:
        """The others make one more call, and this rank will not: it fails on all, wherever they are."""
        self._abandon(ALL, self.take_turn(ALL), reason=reason)

    def _abandon(
        self,
        stream: Stream,
        ticket: Ticket | None,
        again: int | None = None,
        reason: str = "its call was given up before it began",
    ) -> None:
        """A call is given up that has not begun, or not again: it counts all the same, because the others make it."""

        async def skip() -> None:
            if ticket is not None:
                await ticket.wait()
            await self.until_may_begin(stream, again)
            self._skip(reason, stream, again)
            if ticket is not None:
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
            cancelled = isinstance(stop, trio.Cancelled)
            if cancelled and not operation.finished.is_set() and not self._is_mine_to_abort(operation):
                # In doubt: a moment later it is known how it has ended, unless somebody is lost just now.
                with trio.move_on_after(limits.DOUBT_PATIENCE_S, shield=True):
                    if operation.one_sided and host is not None:
                        await host.run(operation)
                    await operation.finished.wait()
            if not operation.finished.is_set():
                timed_out = cancelled and trio.current_time() >= scope.deadline
                self._give_up(operation, f"in {timeout_s:g} s" if timed_out else None)
            elif isinstance(operation.failure, SupersededError):
                self._abandon(Stream(operation.begin.tag), None, operation.number)
            elif cancelled and operation.succeeded:
                # It counts on all ranks, and the arrays hold it: the caller gets to know, and is cancelled where it
                # waits next.
                return
            raise
        finally:
            self._finish(operation)

    def _tell(self, operation: Operation, call: Call | PartsCall, seconds: float) -> None:
        if operation.failure is not None:
            if isinstance(operation.failure, PeerLostError):
                self._show(self.epoch, self.members)
            raise operation.failure
        self._show(operation.begin.epoch, operation.members)
        self.last_outcome = operation.ended_with = operation.outcome(call, seconds)

    def _show(self, epoch: int, members: Sequence[Hashable]) -> None:
        """The caller gets to know this view, if it does not yet."""
        if epoch != self.shown[0]:
            self.shown = (epoch, members)
            self.shown_changed()

    def _start(
        self, call: Call | PartsCall, host: HostPath | None, stream: Stream, again: int | None = None
    ) -> Operation:
        self._check_ended()
        if self._nursery is None and self.size > 1:
            raise UsageError("run() of the collective group must be running before its collectives are called")
        # First whatever may fail on this rank alone, such as memory: once it has begun, the others wait for it.
        try:
            buckets, lanes = self._lanes(call) if host is None else (host.stage(call.arrays), [])
        except BaseException as error:
            self._skip(f"its call failed with {type(error).__name__}: {error}", stream, again)
            raise
        number = self._next_number(stream, again)
        if self.lost:
            # Tell the others, who may not have noticed, so that nobody waits for this rank.
            rank = min(self.lost)
            message = self._abort_message(number, "lost", lost=rank, reason=self.lost[rank])
            self._post(message, stream.ranks(self.size))
            raise self._lost_error()
        if host is None and self.topology.is_uneven:
            for rank, exchange in self._exchanges.items():
                together = call.algorithm == "butterfly"
                exchange.link.pace(self.topology.pace_bytes_per_s(self.rank, rank) if together else None)
        operation = self._new_operation(call, buckets, lanes, host, stream, number)
        if operation is None:
            raise CollectiveAbortedError(f"{call.describe()} could not begin; make it again")
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
        stream: Stream,
        number: int,
        ledger: Ledger | None = None,
    ) -> Operation | None:
        """Begin operation ``number``; None if it cannot begin now after all."""
        ledger = ledger or self.ledger
        if not ledger.begin(number, tag=stream.tag, route=stream.route or (), once=not call.repeats):
            return None
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
        operation.ledger, operation.members = ledger, self.members
        if isinstance(call, Call) and call.compression is not None:
            operation.feedback = call.compression.feedback
        # A thread may be interrupted anywhere here: who finds what is hosted does the rest again.
        if host is not None:
            self.hosted = operation
        before = self._streams.get(stream.number, 0)
        self._register(operation)
        if host is not None:
            if self.freezing or self._ended is not None:
                # Of a thread here and what ends the view, or the group, at least one sees the other.
                self.hosted = None
                del self.operations[number]
                self._streams[stream.number] = before
                return None
            host.begin(operation, call)
        return operation

    def _next_number(self, stream: Stream, again: int | None = None) -> int:
        """Count one more operation of a stream, or ``again`` that one; return its number.

        Raises
        ------
        CollectiveAbortedError, PeerLostError
            If it has failed before this rank came to it.
        """
        if again is not None:
            repeats = self._repeats[stream]
            repeats.remove(again)
            if not repeats:
                del self._repeats[stream]
            self.notify()
            error = self._settled.pop(again, None)
            if error is not None:
                raise type(error)(str(error))
            return again
        while True:
            self._streams[stream.number] = self._streams.get(stream.number, 0) + 1
            number = stream.operation(self._streams[stream.number])
            if number not in self._settled:
                return number
            error = self._settled.pop(number)
            if error is not None:
                raise type(error)(str(error))

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

    def _lanes(self, call: Call | PartsCall) -> tuple[list[Any], list[Lane]]:
        if call.algorithm == SHARED:
            raise UsageError("algorithm 'shared' is for ranks that all share memory, on one host; use 'auto'")
        if isinstance(call, PartsCall):
            return call.lanes(self._key, self._pool.take)
        receiving_only = call.kind == "broadcast" and call.root != self.rank
        buckets = call.arrays.buckets(self._pool.take, fill=not receiving_only)
        return buckets, [self._lane(call, number, bucket) for number, bucket in enumerate(buckets)]

    def _lane(self, call: Call, number: int, bucket: Bucket) -> Lane:
        # What is handed on is not added up.
        dtype = bucket.data.dtype if call.kind == "broadcast" else work_dtype(bucket.data.dtype)
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
        if operation.one_sided and operation.succeeded:
            # Refused, it was entered already, when the view was about to end.
            operation.ledger.commit(operation.number)
        if self.operations.get(operation.number) is operation:
            del self.operations[operation.number]
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
                await self.until_may_begin(stream)
                self._skip(f"its {kind} was refused: {error}", stream)
            finally:
                ticket.leave()
            raise

    async def refuse(self, kind: str, reason: str) -> None:
        """Let the next call of the others fail with ``reason``, and raise it as UsageError."""
        async with self._refusals(kind):
            raise UsageError(reason)

    def _skip(self, reason: str, stream: Stream, again: int | None = None) -> None:
        """The next operation is none on this rank: tell the others, who may have begun it or will."""
        if self._ended is not None or self.lost or self._nursery is None:
            return
        try:
            number = self._next_number(stream, again)
        except SparkleError:
            # Nobody makes it.
            return
        self.ledger.begin(number, tag=stream.tag, route=stream.route or ())
        self.ledger.abort(number)
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
