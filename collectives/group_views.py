"""From one view to the next: how what is open ends, and how a group goes on with other ranks.

Another view is agreed on elsewhere; this is what it means for the operations of a rank. In this order:

1. :meth:`GroupViews.freeze`: the rank promises where its operations stand. Nothing begins or commits from here on. Of
   an operation over shared memory it is known at once how it ends, on all ranks: the boards decide (:mod:`.shared`).
2. :meth:`GroupViews.settle`: the next view was chosen, and with it how all that was open ends.
3. :meth:`GroupViews.enter`: ranks, epoch and links are those of the next view; messages of the old one are dropped.
4. :meth:`GroupViews.open`: the members tell each other what they know of the ways between them, by an operation of its
   own. When that has ended, all have settled what was before, and operations begin: first those that are repeated.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.exchange import Exchange
from sparkle_mesh.collectives.group_threads import GroupThreads
from sparkle_mesh.collectives.ledger import OneView
from sparkle_mesh.collectives.messages import SEQUENCE_MASK, Stream
from sparkle_mesh.collectives.operation import Operation, SupersededError
from sparkle_mesh.collectives.parts_call import parts_call
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    OutcomeUnknownError,
    PeerLostError,
    SparkleError,
)
from sparkle_mesh.transport.link import Link

#: Of the operation with which a view is entered; its sequence is the epoch's.
_ENTRY: Final = Stream("\0the members of a view meet")


class GroupViews(GroupThreads):
    """A rank's operations, over one view after the other."""

    # --- The end of a view -----------------------------------------------------------------------

    def freeze(self) -> None:
        """Before this rank promises where its operations stand: nothing begins or commits from now on.

        What goes over shared memory is decided by the boards: it is entered as committed here, or ends nowhere.
        """
        self.is_open = False
        self.freezing = True
        operation, host = self.hosted, self._host
        if operation is None or host is None or not operation.one_sided:
            return
        if operation.succeeded or not host.try_to_abort(operation):
            operation.ledger.commit(operation.number)
        host.wake()

    async def settle(
        self,
        outcomes: Mapping[int, str],
        gone: Iterable[int],
        *,
        excluded: bool = False,
    ) -> None:
        """End what is open as the next view says.

        Parameters
        ----------
        outcomes
            By number: ``committed``, ``aborted``, ``lost`` with a rank, or ``repeat``. What is open and not named was
            committed here.
        gone
            The ranks of this view that are not in the next.
        excluded
            Whether this rank is not in the next view: then only what has ended for the others ends here.
        """
        self.is_open, self.is_over = False, True
        for rank in gone:
            self.peer_lost(rank, "it is not in the next view")
        lost = self._lost_error()
        repeats: list[Operation] = []
        hosted = self.hosted
        for operation in list(self.operations.values()):
            ends = outcomes.get(operation.number)
            if operation.number >> 32 == _ENTRY.number:
                operation.fail(SupersededError("the view ended before it was entered"))
            elif excluded and ends not in ("committed", "aborted"):
                continue
            elif ends == "repeat":
                repeats.append(operation)
                if not operation.finished.is_set():
                    operation.fail(SupersededError("its view ended before it did"))
            elif not operation.finished.is_set():
                self._settle(operation, ends, lost)
        if self._host is not None:
            self._host.wake()
        given_up, self._given_up = self._given_up, {}
        repeats += [operation for number, operation in given_up.items() if outcomes.get(number) == "repeat"]
        self._note_repeats(repeats, given_up)
        waiting = {number for numbers in self._repeats.values() for number in numbers}
        for number, ends in outcomes.items():
            if number in self._settled or ends not in ("aborted", "lost"):
                continue
            if self._lies_ahead(number) or number in waiting:
                before = f"call number {number & SEQUENCE_MASK} had ended on other ranks before this rank made it"
                self._settled[number] = lost if ends == "lost" else CollectiveAbortedError(f"{before}: it was given up")
        if not excluded:
            await self._until_nothing_is_hosted(hosted)

    def _lies_ahead(self, number: int) -> bool:
        """Whether this rank has not come to ``number``. What is between two ranks is counted anew in every view."""
        stream = number >> 32
        routed = stream >= limits.COLLECTIVE_STREAM_NUMBERS_COUNT
        return not routed and self._streams.get(stream, 0) < number & SEQUENCE_MASK

    def _settle(self, operation: Operation, ends: str | None, lost: PeerLostError) -> None:
        what = f"{operation.begin.description}, call number {operation.sequence},"
        if ends == "lost":
            operation.fail(lost)
        elif ends == "aborted":
            given_up = CollectiveAbortedError(f"{what} was given up by another rank; its reason was lost with a member")
            operation.fail(operation.hint or given_up)
        elif operation.one_sided:
            # It carries itself to the end, which the boards have decided that it has.
            return
        elif ends == "committed" and operation.sent_prepared:
            operation.succeed()
        else:
            operation.fail(OutcomeUnknownError(f"{what} ended as {ends}, which this rank cannot follow"))

    def _note_repeats(self, operations: Iterable[Operation], given_up: Container[int]) -> None:
        """These begin again, in the order in which they had begun; whoever has given up makes way for the next."""
        for operation in sorted(operations, key=lambda one: one.number):
            stream = Stream(operation.begin.tag)
            self._repeats.setdefault(stream, []).append(operation.number)
            if operation.number in given_up:
                self._abandon(stream, None, operation.number)

    async def _until_nothing_is_hosted(self, operation: Operation | None) -> None:
        """Wait until what goes over shared memory has ended here, whoever carries it out."""
        while operation is not None and self.hosted is operation:
            if self._inside_count:
                await operation.finished.wait()
                await trio.lowlevel.checkpoint()
            else:
                # A thread has it, and is in until it has ended.
                await self._enter()
                self._leave()

    # --- The next view ---------------------------------------------------------------------------

    def enter(self, rank: int, epoch: int, members: Sequence[Hashable], links: Mapping[int, Link]) -> None:
        """Be ``rank`` of ``members`` from now on.

        Parameters
        ----------
        links
            To all other ranks, by their new ones. Those that stand already go on; others end.
        """
        standing = {id(exchange.link): exchange for old, exchange in self._exchanges.items() if old not in self.lost}
        self.rank, self.size, self.epoch, self.members = rank, len(members), epoch, tuple(members)
        self.own_member = members[rank]
        self.topology = Topology(self.size)
        self.lost, self.is_over = {}, False
        self._exchanges = {}
        for other, link in links.items():
            exchange = standing.pop(id(link), None)
            if exchange is None:
                exchange = Exchange(other, link, self)
                self.serve(exchange, exchange.read)
                self.serve(exchange, exchange.write)
            self._exchanges[other] = exchange
            exchange.enter(other)
        for exchange in standing.values():
            if self._nursery is not None:
                self._nursery.start_soon(exchange.link.aclose)
        for stream in [stream for stream in self._queues if stream.route is not None]:
            del self._queues[stream]
            self._streams.pop(stream.number, None)
        began, self.next_epoch = self.next_epoch, trio.Event()
        began.set()
        began, self.next_operation = self.next_operation, trio.Event()
        began.set()

    def join_at(self, streams: Iterable[tuple[int, int]], outcomes: Mapping[int, str]) -> None:
        """Begin where the others are: after so many operations of each stream, and not with what has ended."""
        self._streams.update(streams)
        for number, ends in outcomes.items():
            if ends != "repeat" and self._lies_ahead(number):
                self._settled[number] = None

    async def meet(self, row: Array) -> Array:
        """Return the rows of all ranks, one each; when it does, all have settled what was before.

        Raises
        ------
        SupersededError
            If the view ends before.
        """
        if self.size == 1:
            return row[np.newaxis]
        call = parts_call("all_gather", row, self.rank, self.size)
        buckets, lanes = call.lanes(self._key, self._pool.take)
        operation = self._new_operation(call, buckets, lanes, None, _ENTRY, _ENTRY.operation(self.epoch + 1), OneView())
        assert operation is not None
        began, self.next_operation = self.next_operation, trio.Event()
        began.set()
        self._post(operation.begin, operation.agreement.ranks)
        self._take_what_came_ahead(operation)
        self.progress(operation)
        try:
            await operation.finished.wait()
        finally:
            if not operation.finished.is_set():
                operation.fail(SupersededError("the view was not entered"))
            self._finish(operation)
        if operation.failure is not None:
            raise operation.failure
        rows: Array = call.result(operation.lanes)
        return rows

    def open(self, topology: Topology) -> None:
        """All have met: operations begin from now on."""
        self.topology = topology
        if self._host is not None:
            self._host.close(last=False)
        self._host = self._host_path(self._memory, {rank: one.link for rank, one in self._exchanges.items()})
        if self.shown[0] < 0:
            # The caller begins with the view that is opened first.
            self.shown = (self.epoch, self.members)
        # It may be about to end already.
        self.freezing = self.ledger.frozen
        self.is_open = not self.freezing
        self.notify()

    def leave_in_doubt(self) -> None:
        """The others went on, and nobody can tell how what is open here ended for them."""
        for operation in self.operations.values():
            if operation.sent_prepared and not operation.finished.is_set():
                operation.fail(
                    OutcomeUnknownError(
                        f"{operation.begin.description}, call number {operation.sequence}, may have ended with a "
                        "result on the other ranks, which went on without this one: join again and synchronise"
                    )
                )

    def end(self, error: SparkleError) -> None:
        """There is no next view for this rank: what is open and all later calls raise ``error``."""
        self._end(error)
