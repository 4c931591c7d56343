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

import logging
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.calls import (
    Call,
    all_reduce_call,
    barrier_call,
    broadcast_call,
    check_tag,
    check_terms,
    check_timeout,
    reduce_call,
)
from sparkle_mesh.collectives.compression import Compression
from sparkle_mesh.collectives.explanation import Explanation, explain
from sparkle_mesh.collectives.group_state import ALL
from sparkle_mesh.collectives.group_views import GroupViews
from sparkle_mesh.collectives.messages import Stream
from sparkle_mesh.collectives.operation import Operation, Outcome
from sparkle_mesh.collectives.parts_call import PartsCall, check_other, check_root, parts_call, point_to_point_call
from sparkle_mesh.collectives.pending import AsyncPendingReduction
from sparkle_mesh.collectives.tickets import Ticket
from sparkle_mesh.collectives.weighted import weigh
from sparkle_mesh.errors import (
    MeshClosedError,
    PeerLostError,
    UsageError,
)

__all__ = ["CollectiveGroup", "Outcome", "Root"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Root:
    """Whom a caller means by a rank, whatever ranks the next view has.

    Attributes
    ----------
    is_here
        Whether it is the caller.
    """

    member: Hashable
    is_here: bool


class CollectiveGroup(GroupViews):
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
        on_failure: str = "retry",
        min_contributors: int | None = None,
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
        on_failure
            ``"retry"`` to begin again in the next view, if this one ends before the call does; or ``"raise"``.
        min_contributors
            How many ranks the view must have.

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
        terms = (on_failure, min_contributors)
        await self._all_reduce(data, op, algorithm, compression, weight, timeout_s, stream, ticket, terms)
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
        on_failure: str = "retry",
        min_contributors: int | None = None,
    ) -> AsyncPendingReduction[T]:
        """Begin an :meth:`all_reduce`, and return at once. It takes its turn among all calls with the same tag."""
        self._check_ended()
        if self._nursery is None:
            raise UsageError("run() of the collective group must be running before its collectives are called")
        stream = Stream(check_tag(tag))
        ticket = self.take_turn(stream)
        pending = AsyncPendingReduction(data, f"all_reduce {stream}".rstrip(), self.cancel)
        terms = (on_failure, min_contributors)

        async def call() -> Outcome | None:
            return await self._all_reduce(
                data, op, algorithm, compression, weight, timeout_s, stream, ticket, terms, pending.begun
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
        terms: tuple[str, int | None],
        begun: Callable[[Operation], None] | None = None,
    ) -> Outcome | None:
        def make() -> Call:
            if not repeats:
                self._check_ranks_are_known()
            if least is not None and self.size < least:
                self._show(self.epoch, self.members)
                raise PeerLostError(
                    f"{self.size} ranks are left, and min_contributors is {least}; wait for others in synchronize, or "
                    "ask for fewer"
                )
            if weighted is None:
                call = all_reduce_call(data, op, algorithm, self.topology, compression)
            else:
                call = all_reduce_call(weighted.summed, "sum", algorithm, self.topology, compression, weighted.beside)
                call = replace(call, label=weighted.label, given=weighted.look)
            return replace(call, repeats=repeats, terms=said) if said else call

        async with self._refusals("all_reduce", stream, ticket):
            deadline_s = check_timeout(timeout_s)
            repeats, least, said = check_terms(*terms)
            weighted = None if weight is None else weigh(data, op, weight, compression)
            call = make()
        operation = await self.perform(call, deadline_s, stream, begun, ticket, make)
        if weighted is not None:
            weighted.commit()
        return operation.ended_with

    async def broadcast(
        self, data: T, root: int | Root = 0, *, timeout_s: float | None = None, epoch: int | None = None
    ) -> T:
        """Overwrite the arrays of all ranks with those of ``root``.

        Parameters and errors are as for :meth:`all_reduce`; the root's own arrays may be read-only. ``epoch`` is the
        only one in which the call may begin and end, if not None.
        """
        async with self._refusals("broadcast"):
            member = self._member(root)

            def make() -> Call:
                call = broadcast_call(data, self._rank_of(member), self.rank, self.topology)
                return call if epoch is None else replace(call, repeats=False)

            call, deadline_s = make(), check_timeout(timeout_s)
        await self.perform(call, deadline_s, remake=make, bound_to=epoch)
        return data

    async def reduce(self, data: T, op: str = "sum", root: int | Root = 0, *, timeout_s: float | None = None) -> T:
        """Combine the arrays of all ranks in those of ``root``; the others' stay as they are.

        Parameters and errors are as for :meth:`all_reduce`; arrays of ranks other than the root may be read-only.
        """
        async with self._refusals("reduce"):
            member = self._member(root)

            def make() -> Call:
                return reduce_call(data, op, self._rank_of(member), self.rank, self.topology)

            call, deadline_s = make(), check_timeout(timeout_s)
        await self.perform(call, deadline_s, remake=make)
        return data

    async def reduce_scatter(self, data: Any, op: str = "sum", *, timeout_s: float | None = None) -> Any:
        """Combine the arrays of all ranks; return this rank's part of each: new arrays.

        Every array is split along its first axis as :func:`numpy.array_split` does. Errors as :meth:`all_reduce`.
        """
        return await self._parts("reduce_scatter", data, timeout_s, op=op)

    async def all_gather(self, data: Any, *, timeout_s: float | None = None, epoch: int | None = None) -> Any:
        """Return, for every array of shape ``(…)``, a new one of shape ``(size, …)``: those of all ranks.

        Errors are as for :meth:`all_reduce`; ``epoch`` as for :meth:`broadcast`.
        """
        return await self._parts("all_gather", data, timeout_s, epoch=epoch)

    async def gather(self, data: Any, root: int | Root = 0, *, timeout_s: float | None = None) -> Any:
        """Return at ``root`` what :meth:`all_gather` does, and None in each array's place elsewhere."""
        return await self._parts("gather", data, timeout_s, root=root)

    async def scatter(self, data: Any, root: int | Root = 0, *, timeout_s: float | None = None) -> Any:
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
        self,
        kind: str,
        data: Any,
        timeout_s: float | None,
        *,
        op: str = "sum",
        root: object = None,
        epoch: int | None = None,
    ) -> Any:
        call: PartsCall

        def make() -> PartsCall:
            nonlocal call
            if epoch is None:
                self._check_ranks_are_known()
            place = None if member is None else self._rank_of(member)
            call = parts_call(kind, data, self.rank, self.size, op=op, root=place)
            return call

        async with self._refusals(kind):
            member = None if root is None else self._member(root)
            make()
            deadline_s = check_timeout(timeout_s)
        result = call.result((await self.perform(call, deadline_s, remake=make, bound_to=epoch)).lanes)
        # What was given is what is filled.
        return data if kind == "scatter" and self.rank != call.root else result

    async def send(
        self, data: T, to: int, *, timeout_s: float | None = None, tag: str | None = None, epoch: int | None = None
    ) -> T:
        """Give ``data`` to rank ``to``, which must :meth:`receive` it; return ``data`` once it has.

        What one rank sends to another with the same tag, or without one, is received in the order in which it was
        sent, whatever else either does. Data may be read-only. Errors are as for :meth:`all_reduce`, on these two.
        """
        return await self._point_to_point("send", data, to, timeout_s, tag, epoch)

    async def receive(
        self, data: T, source: int, *, timeout_s: float | None = None, tag: str | None = None, epoch: int | None = None
    ) -> T:
        """Fill ``data``, which is like what is sent, with what rank ``source`` gives to :meth:`send`; return it."""
        return await self._point_to_point("receive", data, source, timeout_s, tag, epoch)

    async def _point_to_point(
        self, kind: str, data: T, other: int, timeout_s: float | None, tag: str | None, epoch: int | None
    ) -> T:
        sends = kind == "send"
        ranks = self.shown[1]
        place = check_other("to" if sends else "source", other, self.shown_rank, len(ranks))
        member = ranks[place]
        # While a view ends it is not known yet which ranks the two have in the next.
        async with self._until_routes_are_known():
            self._check_epoch(epoch)
            there = self._rank_of(member)
            route = (self.rank, there) if sends else (there, self.rank)
            stream = Stream(check_tag(tag), route)
            ticket, now = self.take_turn(stream), self.epoch
        async with self._refusals(kind, stream, ticket):
            call = point_to_point_call(kind, data, self.rank, self.size, *route)
            deadline_s = check_timeout(timeout_s)
        # Routes are ranks: they are those of this view alone.
        await self.perform(call, deadline_s, stream, ticket=ticket, bound_to=now)
        return data

    async def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return once every rank has called it. Errors are as for :meth:`all_reduce`."""
        async with self._refusals("barrier"):
            deadline_s = check_timeout(timeout_s)
        await self.perform(barrier_call(), deadline_s)

    @asynccontextmanager
    async def _until_routes_are_known(self) -> AsyncIterator[None]:
        """Those who wait for the next view go on in the order in which they came."""
        if self.may_begin(ALL) and not self._routing.locked():
            yield
            return
        async with self._routing:
            await self.until_may_begin()
            yield

    def root(self, rank: Any) -> Any:
        """Return the :class:`Root` of a call that is about to be made; from any thread.

        What is no rank is returned as it is: the call refuses it in its turn.
        """
        ranks = self.shown[1]
        with suppress(UsageError):
            member = ranks[check_root(rank, len(ranks))]
            return Root(member, is_here=member == self.own_member)
        return rank

    def _member(self, root: object) -> Hashable:
        """Return whom the caller means, who knows the ranks of the last call. Raises UsageError."""
        ranks = self.shown[1]
        return root.member if isinstance(root, Root) else ranks[check_root(root, len(ranks))]

    def _check_ranks_are_known(self) -> None:
        """Raise PeerLostError if ranks are lost of which the caller, whose call depends on them, does not know."""
        lost = [
            f"rank {rank} ({self.describe_member(member)})"
            for rank, member in enumerate(self.shown[1])
            if member not in self.members
        ]
        if lost:
            before = len(self.shown[1])
            self._show(self.epoch, self.members)
            raise PeerLostError(
                f"lost {', '.join(lost)} since the last call: there were {before} ranks, and are {self.size}. This "
                "call is not made; the next one is among those left"
            )

    @property
    def shown_rank(self) -> int:
        """This rank, as the caller knows it: in the view of its last call."""
        return self.shown[1].index(self.own_member)

    def _rank_of(self, member: Hashable) -> int:
        """Return the rank of ``member`` now. Raises PeerLostError if it has none."""
        try:
            return self.members.index(member)
        except ValueError:
            self._show(self.epoch, self.members)
            lost = self.describe_member(member)
            raise PeerLostError(f"{lost} is lost, and this call is of no use without it") from None

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
                    self.serve(exchange, exchange.read)
                    self.serve(exchange, exchange.write)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    # It takes no more tasks, and those that it has yet to begin are told why.
                    self._nursery = None
                    self._end(MeshClosedError("the mesh was left while the collective was in flight"))
        finally:
            if self._host is not None and await self._keep_threads_out():
                self._host.close()

    async def _keep_threads_out(self) -> bool:
        """Return once no thread is in a call, and none comes in any more; False if one is in for too long.

        A thread may be reading what closing lets go of. Its call has failed, and it has been woken.
        """
        with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            await self.gate.enter()
            return True
        logger.warning("a thread is still in a collective of a mesh that was left; its shared memory is kept")
        return False

    def close(self) -> None:
        """Let the operation in flight and all later calls raise MeshClosedError; the links are their owner's."""
        self._end(MeshClosedError("the mesh was closed"))
