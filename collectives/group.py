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

Calls begin in the order in which they were made, and several may be in flight. Calls with a tag are counted by that
tag alone: ranks may make those of different tags in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import trio

from sparkle_mesh.collectives.calls import (
    all_reduce_call,
    barrier_call,
    broadcast_call,
    check_tag,
    check_timeout,
    reduce_call,
)
from sparkle_mesh.collectives.compression import Compression
from sparkle_mesh.collectives.explanation import Explanation, explain
from sparkle_mesh.collectives.group_operations import GroupOperations
from sparkle_mesh.collectives.messages import Stream
from sparkle_mesh.collectives.operation import Operation, Outcome
from sparkle_mesh.collectives.parts_call import check_other, parts_call, point_to_point_call
from sparkle_mesh.collectives.pending import AsyncPendingReduction
from sparkle_mesh.collectives.tickets import Ticket
from sparkle_mesh.collectives.weighted import weigh
from sparkle_mesh.errors import (
    MeshClosedError,
    UsageError,
)

__all__ = ["CollectiveGroup", "Outcome"]

T = TypeVar("T")


class CollectiveGroup(GroupOperations):
    """The ranks of one view, and this one among them; see :class:`.GroupState` for its parameters.

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
        weight: float | None = None,
        timeout_s: float | None = None,
        tag: str | None = None,
    ) -> T:
        """Combine the arrays of all ranks, element by element; every rank ends with the same bits. Returns ``data``.

        Parameters
        ----------
        data
            What :mod:`.arrays` accepts; the same shapes, dtypes and keys on every rank. Reduced in place.
        op
            One of ``reduction.OPS``.
        algorithm
            ``"auto"``, ``"shared"`` (if all ranks share memory), or one of ``cost.ALL_REDUCE_ALGORITHMS``.
        compression
            None; a codec's name, or a :class:`Compression`; or ``"auto"``.
        weight
            Of this rank's arrays in a mean: 0 or more. Ranks all give one, or none does.
        timeout_s
            How long to wait for the other ranks; ``limits.COLLECTIVE_TIMEOUT_S`` if None.
        tag
            Calls with the same tag are matched with each other, in their order.

        Raises
        ------
        UsageError
            For data, an op, an algorithm or a timeout that cannot be. The call counts all the same: on ranks where it
            can be made it raises CollectiveAbortedError, so that the next call is the same one everywhere.
        MismatchError, DivergenceError, CollectiveTimeoutError, CollectiveAbortedError, PeerLostError,
        OutcomeUnknownError, MeshClosedError
            See the module's text. The arrays are as they were.
        """
        stream = Stream(check_tag(tag))
        ticket = self.take_turn(stream)
        await self._all_reduce(data, op, algorithm, compression, weight, timeout_s, stream, ticket)
        return data

    def all_reduce_async(
        self,
        data: T,
        op: str = "sum",
        *,
        algorithm: str = "auto",
        compression: str | Compression | None = None,
        weight: float | None = None,
        timeout_s: float | None = None,
        tag: str | None = None,
    ) -> AsyncPendingReduction[T]:
        """Begin an :meth:`all_reduce`, and return at once. It takes its turn among all calls with the same tag."""
        if self._nursery is None:
            raise UsageError("run() of the collective group must be running before its collectives are called")
        stream = Stream(check_tag(tag))
        ticket = self.take_turn(stream)
        pending = AsyncPendingReduction(data, f"all_reduce {stream}".rstrip())

        async def call() -> Outcome | None:
            return await self._all_reduce(
                data, op, algorithm, compression, weight, timeout_s, stream, ticket, pending.begun
            )

        self._nursery.start_soon(pending.run, call)
        return pending

    async def _all_reduce(
        self,
        data: object,
        op: str,
        algorithm: str,
        compression: str | Compression | None,
        weight: float | None,
        timeout_s: float | None,
        stream: Stream,
        ticket: Ticket,
        begun: Callable[[Operation], None] | None = None,
    ) -> Outcome | None:
        async with self._refusals("all_reduce", stream, ticket):
            deadline_s = check_timeout(timeout_s)
            weighted = None if weight is None else weigh(data, op, weight, compression)
            if weighted is None:
                call = all_reduce_call(data, op, algorithm, self.topology, compression)
            else:
                call = all_reduce_call(weighted.summed, "sum", algorithm, self.topology, compression, weighted.beside)
                call = replace(call, label=weighted.label, given=weighted.look)
        operation = await self.perform(call, deadline_s, stream, begun, ticket)
        if weighted is not None:
            weighted.commit()
        return operation.ended_with

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

    async def send(self, data: T, to: int, *, timeout_s: float | None = None, tag: str | None = None) -> T:
        """Give ``data`` to rank ``to``, which must :meth:`receive` it; return ``data`` once it has.

        What one rank sends to another with the same tag, or without one, is received in the order in which it was
        sent, whatever else either does. Data may be read-only. Errors are as for :meth:`all_reduce`, on these two.
        """
        other = check_other("to", to, self.rank, self.size)
        return await self._point_to_point("send", data, (self.rank, other), timeout_s, tag)

    async def receive(self, data: T, source: int, *, timeout_s: float | None = None, tag: str | None = None) -> T:
        """Fill ``data``, which is like what is sent, with what rank ``source`` gives to :meth:`send`; return it."""
        other = check_other("source", source, self.rank, self.size)
        return await self._point_to_point("receive", data, (other, self.rank), timeout_s, tag)

    async def _point_to_point(
        self, kind: str, data: T, route: tuple[int, int], timeout_s: float | None, tag: str | None
    ) -> T:
        stream = Stream(check_tag(tag), route)
        ticket = self.take_turn(stream)
        async with self._refusals(kind, stream, ticket):
            call = point_to_point_call(kind, data, self.rank, self.size, *route)
            deadline_s = check_timeout(timeout_s)
        await self.perform(call, deadline_s, stream, ticket=ticket)
        return data

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
