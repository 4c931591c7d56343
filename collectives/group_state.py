"""What a rank knows of its group and the operation in flight, and how operations fail.

:class:`.group.CollectiveGroup` starts operations and ends them; this is what the links' tasks and the way over shared
memory tell of them meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, Final

import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.collectives.agreement import name_ranks
from sparkle_mesh.collectives.board import Boards
from sparkle_mesh.collectives.digest import digest_key
from sparkle_mesh.collectives.exchange import Exchange
from sparkle_mesh.collectives.executor import BufferPool
from sparkle_mesh.collectives.gate import Gate
from sparkle_mesh.collectives.host_path import HostPath, group_number
from sparkle_mesh.collectives.ledger import Ledger, OneView
from sparkle_mesh.collectives.messages import SEQUENCE_MASK, Abort, Begin, Control, Prepared, Stream
from sparkle_mesh.collectives.operation import Operation, Outcome
from sparkle_mesh.collectives.tickets import Queue
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    LinkClosedError,
    OutcomeUnknownError,
    PeerLostError,
    ProtocolError,
    SparkleError,
    UsageError,
)
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.shared_memory import SharedMemory, SharedMemoryLink

_log = logging.getLogger(__name__)
#: The calls among all ranks that have no tag.
ALL: Final = Stream()


class GroupState:
    """The ranks of one view, and this one among them.

    Parameters
    ----------
    rank, size
        This rank's place, and how many there are.
    links
        A link to every other rank. The group uses them alone from now on and closes one only when its peer is lost.
    lineage, epoch
        Of the view; the same on every rank.
    describe_rank
        Turns a rank into what error messages call it, such as ``rank 2 (12D3KooW…)``.
    memory
        This process's memory that others on this host can read: for one-sided collectives.
    topology
        What is known of the ways between ranks; the same on every rank.
    ledger
        Where steps of operations are entered, if another view can follow this one. The group then fails no operation
        because a rank is lost: :mod:`.group_views` tells it how what is open ends.
    link_lost
        Called with a rank and why it counts as lost, where another view can follow.
    describe_member
        Turns one of ``members`` into what error messages call it.

    Attributes
    ----------
    last_outcome
        Of the last collective that succeeded; None before.
    protocol_errors
        How many links were closed because their peers broke the protocol.

    lost
        The ranks that are lost, and why.
    operations
        Those in flight, by number, in the order in which they began here.
    hosted
        The one of them that goes over shared memory, if there is one.
    members, own_member
        Who the ranks are, whatever the next view's ranks will be; and which of them this one is.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        links: Mapping[int, Link],
        lineage: bytes,
        epoch: int,
        describe_rank: Callable[[int], str] = lambda rank: f"rank {rank}",
        memory: SharedMemory | None = None,
        topology: Topology | None = None,
        ledger: Ledger | None = None,
        link_lost: Callable[[int, str], None] = lambda rank, reason: None,
        describe_member: Callable[[Hashable], str] = lambda member: f"rank {member}",
    ) -> None:
        if not 0 <= rank < size or size > limits.MESH_MEMBERS_MAX_COUNT:
            raise UsageError(f"rank {rank} of {size} is not a rank of a group")
        others = [other for other in range(size) if other != rank]
        if sorted(links) != others:
            raise UsageError(f"rank {rank} of {size} needs links to {others}, not to {sorted(links)}")
        self.rank = rank
        self.size = size
        #: What plans are made from; the same on every rank.
        self.topology = topology or Topology(size)
        self.lineage = lineage
        self.epoch = epoch
        self.members: Sequence[Hashable] = range(size)
        self.own_member: Hashable = rank
        #: Whether other views can follow.
        self.supervised = ledger is not None
        self.ledger: Ledger = ledger or OneView()
        self._link_lost = link_lost
        self.describe_member = describe_member
        self._routing = trio.Lock()
        #: Whether operations may begin: not while a view ends, nor before the next one is entered.
        self.is_open = ledger is None
        #: Whether all that was open in this epoch is settled, and the next one is not entered yet.
        self.is_over = False
        #: By stream: operations that must begin again before others may.
        self._repeats: dict[Stream, list[int]] = {}
        #: Those whose callers have stopped waiting while the view ended.
        self._given_up: dict[int, Operation] = {}
        #: What ended before this rank came to it.
        self._settled: dict[int, SparkleError | None] = {}
        #: Set, and replaced, when what operations wait for to begin may have changed.
        self._changed = trio.Event()
        #: The epoch of the last operation that has ended here, and its ranks; -1 before the first view is opened.
        self.shown: tuple[int, Sequence[Hashable]] = (-1 if self.supervised else epoch, self.members)
        self.shown_changed: Callable[[], None] = lambda: None
        self.last_outcome: Outcome | None = None
        self.protocol_errors = 0
        self.operations: dict[int, Operation] = {}
        self.hosted: Operation | None = None
        #: By stream: the number of the last operation begun.
        self._streams: dict[int, int] = {0: 0}
        self.next_operation = trio.Event()
        self.next_epoch = trio.Event()
        #: Set before the view ends, for threads.
        self.freezing = False
        self._memory = memory
        self._describe = describe_rank
        self._key = digest_key(lineage)
        self._exchanges = {other: Exchange(other, link, self) for other, link in links.items()}
        #: The ranks that are lost, and why.
        self.lost: dict[int, str] = {}
        self._peer_lost = trio.Event()
        self._ended: SparkleError | None = None
        #: Calls of a stream begin in the order in which they were made.
        self._queues: dict[Stream, Queue] = {Stream(): Queue()}
        #: Of calls that are made in the same order everywhere, and of those that are not and must not wait for others.
        self._slots = trio.Semaphore(limits.COLLECTIVE_IN_FLIGHT_MAX_COUNT)
        self._unordered_slots = trio.Semaphore(limits.COLLECTIVE_UNORDERED_MAX_COUNT)
        self._host_turn = trio.Lock()
        self.gate = Gate()
        self._gate_turn = trio.Lock()
        self._inside_count = 0
        self._pool = BufferPool()
        self._nursery: trio.Nursery | None = None
        self._ran = False
        self._host = None if self.supervised else self._host_path(memory, links)

    def _host_path(self, memory: SharedMemory | None, links: Mapping[int, Link]) -> HostPath | None:
        if memory is None or self.size == 1:
            return None
        shared = {rank: link for rank, link in links.items() if isinstance(link, SharedMemoryLink)}
        if len(shared) == len(links):
            return HostPath(self, memory, shared)
        Boards.refuse(memory, links.values(), group_number(self.lineage, self.epoch))
        return None

    @property
    def number(self) -> int:
        """The number of the last operation among all that was begun without a tag."""
        return self._streams[0]

    def is_ahead(self, number: int) -> bool:
        """Whether this rank has not come to operation ``number``."""
        if self._streams.get(number >> 32, 0) < number & SEQUENCE_MASK:
            return True
        return any(number in numbers for numbers in self._repeats.values())

    def _register(self, operation: Operation) -> None:
        """``operation`` is in flight; doing so again changes nothing."""
        self.operations[operation.number] = operation
        stream = operation.number >> 32
        self._streams[stream] = max(operation.sequence, self._streams.get(stream, 0))

    # --- Views -----------------------------------------------------------------------------------

    def notify(self) -> None:
        """Let those look again who wait for operations to begin."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def may_begin(self, stream: Stream, again: int | None = None) -> bool:
        """Whether the next operation of ``stream`` may begin, or the one with number ``again`` once more."""
        if self._ended is not None or not self.supervised:
            return True
        repeats = self._repeats.get(stream)
        if not self.is_open or self.lost:
            return False
        return repeats[0] == again if repeats else not self.ledger.is_full

    async def until_may_begin(self, stream: Stream = ALL, again: int | None = None) -> None:
        """Wait until then; no checkpoint if that is now."""
        while not self.may_begin(stream, again):
            await self._changed.wait()

    # --- Losing ranks ----------------------------------------------------------------------------

    def peer_lost(self, rank: int, reason: str) -> None:
        """``rank`` is gone: operations that need it raise PeerLostError, or wait for the next view to end them.

        An operation whose last word from that rank has been heard still ends well: a rank may leave right after
        its last collective.
        """
        if rank in self.lost or rank not in self._exchanges:
            return
        if self.supervised and self._ended is None:
            self._link_lost(rank, reason)
        self.lost[rank] = reason[: limits.REASON_MAX_CHARS]
        noticed, self._peer_lost = self._peer_lost, trio.Event()
        noticed.set()
        if self._nursery is not None:
            self._nursery.start_soon(self._exchanges[rank].link.aclose)
        for operation in list(self.operations.values()):
            self._peer_lost_in(operation, rank, reason)

    def _peer_lost_in(self, operation: Operation, rank: int, reason: str) -> None:
        if operation.finished.is_set() or rank not in operation.agreement.ranks:
            return
        if operation.one_sided and self._host is not None:
            self._host.wake()
        elif rank in operation.agreement.prepared and not operation.execution.expects(rank):
            operation.execution.forget_sends(rank)
            self.progress(operation)
        elif not self.supervised:
            self._abort(operation, self._lost_error(), cause="lost", lost=rank, reason=reason)

    async def wait_peer_lost(self, rank: int) -> None:
        """Return once ``rank`` counts as lost here, for example because its link has ended."""
        while rank not in self.lost:
            await self._peer_lost.wait()

    # --- What the exchanges use ------------------------------------------------------------------

    def heard(self, rank: int, message: Control) -> None:
        """``rank`` said ``message`` about an operation in flight. Raises ProtocolError."""
        operation = self.operations[message.operation]
        agreement = operation.agreement
        if operation.finished.is_set():
            return
        match message:
            case _ if rank not in agreement.ranks:
                raise ProtocolError(f"it spoke of operation {message.operation}, in which it has no part")
            case Begin():
                if rank in agreement.begins:
                    raise ProtocolError(f"a second Begin of operation {message.operation}")
                agreement.begun(rank, message)
                if agreement.mismatched:
                    operation.execution.stop()
                self._exchanges[rank].wake()
            case Prepared():
                if rank not in agreement.begins or rank in agreement.prepared:
                    raise ProtocolError(f"Prepared out of order in operation {message.operation}")
                agreement.prepared[rank] = message.digest
            case _:
                if not (operation.one_sided and self._host is not None and self._host.committed):
                    self._aborted(operation, rank, message)
        if operation.one_sided and self._host is not None:
            self._host.wake()
        else:
            self.progress(operation)

    def post_begin(self, operation: Operation) -> None:
        """Go on over the links with ``operation``, which was begun one-sided: ranks have called different things."""
        operation.one_sided = False
        self._post(operation.begin, operation.agreement.ranks)
        self.progress(operation)

    def fail_for_the_lost(self, operation: Operation) -> None:
        """End ``operation``, which is aborted, because ranks are lost; the next view does, where there can be one."""
        if self.supervised:
            return
        rank = min(self.lost)
        self._abort(operation, self._lost_error(), cause="lost", lost=rank, reason=self.lost[rank])

    def progress(self, operation: Operation) -> None:
        """Something was sent, received or said: see whether a next stage is reached."""
        agreement, execution = operation.agreement, operation.execution
        if operation.finished.is_set() or not (execution.stopped or execution.complete):
            return
        if not operation.sent_prepared and not execution.stopped and execution.complete and not agreement.absent:
            digest = execution.digest(self._key)
            if not operation.ledger.prepare(operation.number, digest):
                return
            operation.sent_prepared = True
            agreement.prepared[self.rank] = digest
            self._post(Prepared(epoch=self.epoch, operation=operation.number, digest=digest), agreement.ranks)
            operation.last_words = {
                rank: exchange.posted for rank, exchange in self._exchanges.items() if rank in agreement.ranks
            }
        if agreement.settled:
            error = agreement.verdict(self._describe)
            if error is not None:
                if operation.ledger.abort(operation.number, told=True):
                    operation.fail(error)
                else:
                    operation.hint = error
            elif not execution.sends_left and not self._unsaid(operation) and operation.ledger.commit(operation.number):
                operation.finished.set()

    def _unsaid(self, operation: Operation) -> bool:
        """Whether a live peer is still to be told that this rank is done: leaving before would leave it without."""
        return any(
            self._exchanges[rank].said < last for rank, last in operation.last_words.items() if rank not in self.lost
        )

    # --- Failure ---------------------------------------------------------------------------------

    def cancel(self, operation: Operation) -> None:
        """Give ``operation`` up on all ranks; if it has gone too far for that, let it go on."""
        if not operation.finished.is_set() and self._is_mine_to_abort(operation):
            self._abort_for_caller(operation, None)

    def _is_mine_to_abort(self, operation: Operation) -> bool:
        """Whether no rank can have committed ``operation``; over shared memory none can from then on."""
        if operation.sent_prepared:
            return False
        return not operation.one_sided or self._host is None or self._host.try_to_abort(operation)

    def _give_up(self, operation: Operation, timed_out: str | None) -> None:
        """The caller stops waiting: because it was cancelled, or because time ran out."""
        if self._is_mine_to_abort(operation):
            self._abort_for_caller(operation, timed_out)
            return
        what = f"{operation.begin.description}, call number {operation.sequence},"
        if operation.one_sided and self._host is not None:
            text = (
                f"{what} was given up when all had begun to write its result: what its arrays hold is undefined "
                f"({self._who_is_missing(operation)})"
            )
        else:
            text = f"{what} was given up when this rank held the result and others may have returned with it already"
        self._end(OutcomeUnknownError(f"{text}; this rank has left: join again and synchronise"))
        for rank in self._exchanges:
            self.peer_lost(rank, "this rank has left")

    def _abort_for_caller(self, operation: Operation, timed_out: str | None) -> None:
        what = f"{operation.begin.description}, call number {operation.sequence},"
        if not operation.ledger.abort(operation.number, told=True):
            # The view ends: the next one gets to hear of it, when this would have begun again.
            self._given_up[operation.number] = operation
            missing = f": {self._who_is_missing(operation)}" if timed_out else ""
            ended = f"did not finish {timed_out}{missing}" if timed_out else "was cancelled"
            kind = CollectiveTimeoutError if timed_out else CollectiveAbortedError
            self._fail(operation, kind(f"{what} {ended}"))
        elif timed_out is None:
            error: SparkleError = CollectiveAbortedError(f"{what} was cancelled")
            self._abort(operation, error, cause="cancelled", reason="its call was cancelled")
        elif operation.agreement.mismatched:
            error = operation.agreement.verdict(self._describe) or CollectiveTimeoutError(what)
            self._abort(operation, error, cause="mismatch", reason="ranks called different collectives")
        else:
            text = f"did not finish {timed_out}: {self._who_is_missing(operation)}"
            self._abort(operation, CollectiveTimeoutError(f"{what} {text}"), cause="timeout", reason=text)

    def _who_is_missing(self, operation: Operation) -> str:
        host = self._host if operation.one_sided else None
        absent = operation.agreement.absent if host is None else host.absent(operation)
        if absent:
            return "; ".join(
                f"{self._describe(rank)} has not called it (last heard of: {self._last_seen(rank)})" for rank in absent
            )
        unfinished = operation.agreement.unprepared if host is None else host.unfinished(operation)
        missing = [rank for rank in unfinished if rank != self.rank]
        if not missing:
            return "all that take part have called it, but this rank did not finish in time"
        return f"all ranks have called it, but {name_ranks(missing, self._describe)} did not finish"

    def _last_seen(self, rank: int) -> str:
        said = self._exchanges[rank].last_seen
        return max(said, self._host.last_seen(rank) if self._host is not None else said)[1]

    def _aborted(self, operation: Operation, rank: int, message: Abort) -> None:
        if message.cause == "lost" and message.lost is not None and not self.supervised:
            told = f"{message.reason} (as {self._describe(rank)} tells)"
            lost = rank if message.lost == self.rank else message.lost
            if lost == rank:
                told = f"it has lost its link to this rank: {message.reason}"
            self.peer_lost(lost, told)
            if operation.finished.is_set():
                return
            # The rank that tells will not finish, even if the lost one's part is here.
            self._abort(operation, self._lost_error(), cause="lost", lost=lost, reason=told)
            return
        text = (
            f"{operation.begin.description}, call number {operation.sequence}, was given up by "
            f"{self._describe(message.origin)}: {message.reason}"
        )
        # Where ranks differ too, that is what a caller must know.
        error = operation.agreement.verdict(self._describe) or CollectiveAbortedError(text)
        if not operation.ledger.abort(operation.number, told=True):
            operation.hint = error
            return
        self._abort(operation, error, cause=message.cause, origin=message.origin, reason=message.reason)

    def _fail(self, operation: Operation, error: SparkleError) -> None:
        """End ``operation`` with ``error``, and let whoever carries it out over shared memory look."""
        operation.fail(error)
        if operation.one_sided and self._host is not None:
            self._host.wake()

    def _abort(
        self,
        operation: Operation,
        error: SparkleError,
        *,
        cause: str,
        origin: int | None = None,
        lost: int | None = None,
        reason: str = "",
    ) -> None:
        """Fail ``operation`` here and, passing the news on, everywhere."""
        self._fail(operation, error)
        message = self._abort_message(operation.number, cause, origin=origin, lost=lost, reason=reason)
        self._post(message, operation.agreement.ranks)

    def _abort_message(
        self, number: int, cause: str, *, origin: int | None = None, lost: int | None = None, reason: str = ""
    ) -> Abort:
        return Abort(
            epoch=self.epoch,
            operation=number,
            cause=cause,
            origin=self.rank if origin is None else origin,
            lost=lost,
            reason=reason[: limits.REASON_MAX_CHARS],
        )

    def _lost_error(self) -> PeerLostError:
        lost = "; ".join(f"{self._describe(rank)}: {reason}" for rank, reason in sorted(self.lost.items()))
        if self.supervised:
            return PeerLostError(f"lost {lost}. This call is not made again; the next one is among those left")
        return PeerLostError(f"lost {lost}. {self._describe(self.rank)} cannot go on in this view; join again")

    def _end(self, error: SparkleError) -> None:
        """No further calls."""
        if self._ended is None:
            self._ended = error
        if self._host is not None:
            self._host.retire()
        for operation in list(self.operations.values()):
            if not operation.finished.is_set():
                self._fail(operation, type(error)(str(error)))
        self.notify()

    def _post(self, message: Control, ranks: Sequence[int]) -> None:
        data = wire.encode(message)
        for rank, exchange in self._exchanges.items():
            if rank in ranks and rank not in self.lost:
                exchange.post(data)

    def serve(self, exchange: Exchange, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run one more task of an exchange."""
        if self._nursery is not None:
            self._nursery.start_soon(self._serve, exchange, work, *arguments)

    async def _serve(self, exchange: Exchange, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run one of an exchange's tasks; when its link ends or its peer misbehaves, the peer is lost."""
        try:
            await work(*arguments)
        except LinkClosedError as error:
            self.exchange_ended(exchange, str(error) or "its link was closed")
        except ProtocolError as error:
            self._broke_protocol(exchange, error)

    def _broke_protocol(self, exchange: Exchange, error: ProtocolError) -> None:
        if self._exchanges.get(exchange.rank) is not exchange:
            # It is of a view that has ended, and so is its link.
            return
        self.protocol_errors += 1
        _log.warning("closing the link to %s: %s", self._describe(exchange.rank), error)
        self.exchange_ended(exchange, f"it broke the protocol: {error}")

    def exchange_ended(self, exchange: Exchange, reason: str) -> None:
        """The link of ``exchange`` is of no more use; its peer is lost, if that is still how it is reached."""
        if self._exchanges.get(exchange.rank) is exchange:
            self.peer_lost(exchange.rank, reason)
