"""The two tasks that own one link to one peer: a reader and a writer.

The reader never stops reading: data for an operation in flight goes where its execution says, control messages go to
the group, data of an operation that has failed is dropped, and the little that a peer may send ahead of this rank is
held. So the end of a link is noticed at once, an abort is not stuck behind data, and after a failed operation links are
in step for the next one. Two exceptions hold a peer back: a segment that cannot be taken before another peer's has
come, and a peer that is too many operations ahead.

Several operations may be in flight, and messages of one then wait behind those of others. A segment that would hold
its peer back is therefore held itself, unless what it waits for comes from a peer of lower rank
(:attr:`.plan.Plan.blocks_in_order`): then links wait for links of lower ranks alone, and never in a circle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.digest import parts
from sparkle_mesh.collectives.messages import (
    SEQUENCE_MASK,
    Abort,
    Begin,
    Control,
    data_operation,
    decode_control,
    is_data,
)
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import LinkClosedError, ProtocolError
from sparkle_mesh.transport.link import Link

if TYPE_CHECKING:
    from sparkle_mesh.collectives.executor import Incoming
    from sparkle_mesh.collectives.group_state import GroupState
    from sparkle_mesh.collectives.operation import Operation


@dataclass(slots=True)
class Ahead:
    """What a peer has said about an operation that this rank has not come to."""

    begin: Begin | None = None
    abort: Abort | None = None
    data: deque[tuple[bytes, bytearray]] = field(default_factory=deque)

    @property
    def held_bytes(self) -> int:
        return sum(len(payload) for _, payload in self.data)


class Exchange:
    """One link's reader and writer."""

    def __init__(self, rank: int, link: Link, group: GroupState) -> None:
        self.rank = rank
        self.link = link
        self.ahead: dict[int, Ahead] = {}
        #: The number of the last call that the peer spoke of, and that for people.
        self.last_seen = (0, "nothing yet")
        self._group = group
        #: How many control messages were posted, and how many of them are with the operating system.
        self.posted = 0
        self.said = 0
        self._outbox: deque[bytes] = deque()
        self._closed = False
        self._wake = trio.Event()
        self._scratch = self._encoded = np.empty(0, np.uint8)
        #: By operation: what came before it could be taken, in the order in which it came.
        self._held: dict[tuple[int, int], deque[tuple[Incoming, bytearray]]] = {}

    def enter(self, rank: int) -> None:
        """Another epoch begins, in which the peer is ``rank``: what was said of the one before is of no more use."""
        self.rank = rank
        self.ahead = {}
        self._outbox.clear()
        self.said = self.posted

    # --- Writing ---------------------------------------------------------------------------------

    def post(self, message: bytes) -> None:
        """Queue an encoded control message; it goes before any data that is not on its way yet."""
        if self._closed:
            return
        if len(self._outbox) >= limits.COLLECTIVE_OUTBOX_MAX_COUNT:
            self._group.exchange_ended(self, f"it has not taken {len(self._outbox)} messages")
            return
        self._outbox.append(message)
        self.posted += 1
        self.wake()

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    async def write(self) -> None:
        """Send what is queued and what the running operation has ready, until the link is closed.

        That the peer takes nothing more does not make it lost: what it sent before may still have to be read,
        such as the last word of an operation that it left after. The reader comes to the end of the link.
        """
        try:
            await self._write()
        except LinkClosedError:
            self._closed = True
            self._outbox.clear()
            self.said = self.posted

    async def _write(self) -> None:
        while True:
            batch: list[tuple[bytes, tuple[Array, ...]]] = []
            while self._outbox:
                batch.append((self._outbox.popleft(), ()))
            said = len(batch)
            # The oldest operation goes first; while it has nothing to send, others do.
            operation, message = None, None
            for operation in self._group.operations.values():
                begun = self.rank in operation.agreement.begins
                message = operation.execution.next_send(self.rank, begun, self.wake)
                if message is not None:
                    # With what is said before: a small message costs as much as both.
                    batch.append((message.header, (message.data,)))
                    break
            if not batch:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            await self.link.send_all(batch)
            self.said += said
            if operation is not None and message is not None:
                operation.execution.sent(self.rank, message)
                self._group.progress(operation)
            if said:
                for other in list(self._group.operations.values()):
                    self._group.progress(other)

    # --- Reading ---------------------------------------------------------------------------------

    async def read(self) -> None:
        """Take what comes, for ever.

        Raises
        ------
        LinkClosedError
            At the end of the link.
        ProtocolError
            If the peer breaks the protocol.
        """
        while True:
            header, nbytes = await self.link.receive_header()
            if is_data(header):
                await self._data(bytes(header), nbytes)
            elif nbytes:
                raise ProtocolError(f"a control message came with a payload of {nbytes} bytes")
            else:
                await self._control(decode_control(header))

    async def _control(self, message: Control) -> None:
        group = self._group
        if not await self._is_of_now(message.epoch):
            return
        if isinstance(message, Begin):
            if message.lineage != group.lineage:
                raise ProtocolError("the peer is in another lineage of the mesh")
            number = message.operation & SEQUENCE_MASK
            self.last_seen = (number, f"call {number}, {message.description}")
        while group.is_ahead(message.operation) and self._too_far_ahead(message.operation):
            await group.next_operation.wait()
            if message.epoch != group.epoch:
                return
        if group.is_ahead(message.operation):
            self._note_ahead(message)
        elif message.operation in group.operations:
            group.heard(self.rank, message)

    async def _is_of_now(self, epoch: int) -> bool:
        """Whether what comes is of this epoch; what is of a later one waits until this rank has come to it."""
        group = self._group
        if epoch != group.epoch and not group.supervised:
            raise ProtocolError(f"a message of epoch {epoch} in epoch {group.epoch}")
        while epoch > group.epoch:
            await group.next_epoch.wait()
        return epoch == group.epoch and not group.is_over

    def _too_far_ahead(self, number: int) -> bool:
        return number not in self.ahead and len(self.ahead) >= limits.COLLECTIVE_OPERATIONS_AHEAD_MAX_COUNT

    def _note_ahead(self, message: Control) -> None:
        ahead = self.ahead.setdefault(message.operation, Ahead())
        match message:
            case Begin():
                if ahead.begin is not None or ahead.abort is not None:
                    raise ProtocolError(f"a second Begin of operation {message.operation}")
                ahead.begin = message
            case Abort():
                ahead.abort = message
                ahead.data.clear()
            case _:
                raise ProtocolError(f"Prepared for operation {message.operation}, which this rank has not begun")

    async def _data(self, header: bytes, nbytes: int) -> None:
        group = self._group
        epoch, number = data_operation(memoryview(header))
        if not await self._is_of_now(epoch):
            await self.link.discard_payload()
            return
        operation = group.operations.get(number)
        if operation is None and group.is_ahead(number):
            await self._hold_ahead(epoch, number, header, nbytes)
        elif operation is None or operation.execution.stopped:
            await self.link.discard_payload()
        else:
            execution, held = operation.execution, self._held.get((epoch, number))
            expected = execution.next_receive(self.rank, len(held or ()))
            if expected is None or expected.header != header:
                raise ProtocolError(f"data out of order in operation {number}")
            if held is None and not execution.would_block(expected):
                await self._take(operation, expected, nbytes, None)
                return
            check_size(operation, expected, nbytes)
            self._hold(operation, expected, await self._receive_whole(nbytes))

    async def _receive_whole(self, nbytes: int) -> bytearray:
        payload = bytearray(nbytes)
        if nbytes:
            await self.link.receive_into((payload,))
        return payload

    async def _hold_ahead(self, epoch: int, number: int, header: bytes, nbytes: int) -> None:
        ahead = self.ahead.get(number)
        if ahead is None or ahead.begin is None or ahead.abort is not None:
            raise ProtocolError(f"data of operation {number}, which the peer has not begun")
        if ahead.held_bytes + nbytes > limits.COLLECTIVE_EAGER_MAX_BYTES:
            raise ProtocolError(f"{nbytes} bytes of operation {number}, ahead of this rank, and past the limit")
        payload = await self._receive_whole(nbytes)
        if epoch != self._group.epoch:
            return
        operation = self._group.operations.get(number)
        if operation is not None:
            # It began here while the payload was coming in.
            self.hold_all(operation, ((header, payload),))
        elif self._group.is_ahead(number):
            ahead.data.append((header, payload))

    # --- What came before it can be taken --------------------------------------------------------

    def hold_all(self, operation: Operation, messages: Iterable[tuple[bytes, bytearray]]) -> None:
        """Take ``messages`` of ``operation`` in their turn. Raises ProtocolError for what does not belong."""
        for header, payload in messages:
            if operation.execution.stopped:
                return
            expected = operation.execution.next_receive(self.rank, len(self._held.get(_key(operation), ())))
            if expected is None or expected.header != header:
                raise ProtocolError(f"data out of order in operation {operation.number}")
            check_size(operation, expected, len(payload))
            self._hold(operation, expected, payload)

    def _hold(self, operation: Operation, expected: Incoming, payload: bytearray) -> None:
        """Take ``payload`` once all that came before has been, and what it waits for is there; go on reading."""
        held = self._held.get(_key(operation))
        if held is not None:
            held.append((expected, payload))
            return
        self._held[_key(operation)] = deque([(expected, payload)])
        self._group.serve(self, self._take_held, operation)

    async def _take_held(self, operation: Operation) -> None:
        held = self._held[_key(operation)]
        try:
            while held:
                expected, payload = held[0]
                if not operation.execution.stopped:
                    await self._take(operation, expected, len(payload), payload)
                held.popleft()
        finally:
            del self._held[_key(operation)]

    async def _take(self, operation: Operation, expected: Incoming, nbytes: int, held: bytearray | None) -> None:
        """Receive one segment to where it belongs; reduce and digest it part by part, while each is in the cache."""
        check_size(operation, expected, nbytes)
        execution, lane, reduction = operation.execution, expected.lane, expected.reduction
        if lane.waiting[expected.index] and not await execution.ready(lane, expected.index):
            await self._drop(held)
            return
        if not lane.form.is_plain(expected.step.content):
            await self._take_encoded(operation, expected, held)
            return
        last = expected.index if reduction is None else reduction
        digest = lane.digest_of(last)
        # The scratch is the reader's; what is held is reduced from where it is.
        there = None if held is None else np.frombuffer(held, lane.dtype)
        target = lane.target(expected) if reduction is None else None
        item_bytes = lane.dtype.itemsize
        for start, stop in parts(nbytes // item_bytes, item_bytes):
            if target is not None:
                part = target[start:stop]
                if there is not None:
                    part[:] = there[start:stop]
            elif there is not None:
                part = there[start:stop]
            else:
                part = self._scratch_for(lane.dtype, nbytes)[: stop - start]
            if there is None:
                await self.link.receive_into((part,))
            if reduction is not None:
                if not start:
                    lane.done(expected.index)
                    if lane.waiting[reduction]:
                        await execution.ready(lane, reduction)
                if not execution.stopped:
                    part = lane.reduce_part(reduction, start, part)
            if execution.stopped:
                await self._drop(held)
                return
            if digest is not None:
                digest.update(part)
        lane.done(last, digest)
        execution.received(self.rank, expected)
        self._group.progress(operation)

    async def _take_encoded(self, operation: Operation, expected: Incoming, held: bytearray | None) -> None:
        """Receive one segment that travels in another form, and take it as a whole."""
        execution, lane, reduction = operation.execution, expected.lane, expected.reduction
        if held is None:
            data = self._encoded = _at_least(self._encoded, expected.nbytes)
            data = data[: expected.nbytes]
            if expected.nbytes:
                await self.link.receive_into((data,))
        else:
            data = np.frombuffer(held, np.uint8)
        last = expected.index
        if reduction is not None:
            lane.done(expected.index)
            if lane.waiting[reduction]:
                await execution.ready(lane, reduction)
            last = reduction
        if execution.stopped:
            return
        nbytes = (expected.step.stop - expected.step.start) * lane.dtype.itemsize if reduction is not None else 0
        if held is None:
            scratch = self._scratch = _at_least(self._scratch, nbytes)
        else:
            scratch = np.empty(nbytes, np.uint8)
        lane.take_encoded(expected, data, scratch[:nbytes].view(lane.dtype))
        lane.done(last)
        execution.received(self.rank, expected)
        self._group.progress(operation)

    async def _drop(self, held: bytearray | None) -> None:
        if held is None:
            await self.link.discard_payload()

    def _scratch_for(self, dtype: np.dtype[Any], nbytes: int) -> Array:
        nbytes = min(nbytes, limits.COLLECTIVE_PART_BYTES)
        self._scratch = _at_least(self._scratch, nbytes)
        return self._scratch[:nbytes].view(dtype)


def _key(operation: Operation) -> tuple[int, int]:
    return operation.begin.epoch, operation.number


def check_size(operation: Operation, expected: Incoming, nbytes: int) -> None:
    """Raises ProtocolError if what comes is not of the size that belongs there."""
    if nbytes != expected.nbytes:
        raise ProtocolError(f"{nbytes} bytes came in operation {operation.number} where {expected.nbytes} belong")


def _at_least(buffer: Array, nbytes: int) -> Array:
    return buffer if buffer.size >= nbytes else np.empty(nbytes, np.uint8)
