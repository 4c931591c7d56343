"""Operations that the caller's own thread carries out, as far as that goes: see :mod:`.quick`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import trio

from sparkle_mesh.collectives.call_identity import SHARED
from sparkle_mesh.collectives.calls import Call, all_reduce_call, barrier_call, check_timeout
from sparkle_mesh.collectives.group_operations import GroupOperations
from sparkle_mesh.collectives.group_state import ALL
from sparkle_mesh.collectives.host_path import HostPath
from sparkle_mesh.collectives.operation import Operation, SupersededError
from sparkle_mesh.collectives.quick import QuickCall
from sparkle_mesh.collectives.shared import Setback
from sparkle_mesh.errors import PeerLostError, UsageError


class GroupThreads(GroupOperations):
    """A rank's operations; those over shared memory by whichever thread calls them."""

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

        def remake() -> Call:
            return all_reduce_call(data, op, algorithm, self.topology)

        return QuickCall(self, host, call, deadline_s, remake) if host.takes(call) else None

    def quick_barrier(self, timeout_s: float | None) -> QuickCall | None:
        """Return a barrier likewise."""
        if self._host is None or not self._host.ready:
            return None
        try:
            return QuickCall(self, self._host, barrier_call(), check_timeout(timeout_s), barrier_call)
        except UsageError:
            return None

    def start_quickly(self, call: Call, host: HostPath) -> Operation | None:
        """From any thread that has entered the gate: begin ``call``; None if that needs trio."""
        number = self.number + 1
        if (
            self._ended is not None
            or self.lost
            or self._nursery is None
            or number in self._settled
            or not self.may_begin(ALL)
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
        return self._new_operation(call, buckets, [], host, ALL, number)

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
        operation.seconds = trio.current_time() - started + timeout_s - left_s

    async def go_on(self, operation: Operation, call: Call, timeout_s: float, remake: Callable[[], Call]) -> None:
        """Tell how an adopted ``operation`` has ended; make it again, if its view has ended before it did."""
        if isinstance(operation.failure, SupersededError):
            await self.perform(call, timeout_s, remake=remake, again=operation)
            return
        if isinstance(operation.failure, PeerLostError) and self.supervised:
            with trio.move_on_after(timeout_s):
                await self.until_may_begin()
        self._tell(operation, call, operation.seconds)
