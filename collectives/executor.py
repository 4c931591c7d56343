"""Runs the plans of one operation over real arrays: what may be sent now, where a message belongs, what follows.

It holds no link and starts no task: the tasks that own the links ask it what to send next and where to receive,
and tell it when that is done. One :class:`Lane` runs one plan over one flat vector; an :class:`Execution` is the
lanes of an operation, one after the other on every link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.digest import SegmentDigest, segment_digest, whole_digest
from sparkle_mesh.collectives.form import Form
from sparkle_mesh.collectives.messages import encode_data
from sparkle_mesh.collectives.plan import Plan
from sparkle_mesh.collectives.reduction import Array, Reduction
from sparkle_mesh.collectives.schedule import Accumulate, Content, Copy, Receive, Reduce, Send, Space, Step


class Lane:
    """One plan over one vector.

    Parameters
    ----------
    plan
        What to do.
    source
        The caller's data (or its staging): flat, the elements that the schedule says this rank gives; never written,
        unless it is ``work`` too.
    work
        The elements that the schedule says this rank holds, of the dtype that is added up in; holds the result at the
        end, unless the plan's result is its input.
    reduction
        How to combine.
    key
        Of the digests.
    form
        How numbers travel.
    lost
        Like ``source``: where what sending in that form loses of this rank's numbers is noted, for error feedback.
    """

    __slots__ = (
        "_encoded",
        "_key",
        "_reduction",
        "_source_at",
        "_work_at",
        "awaited",
        "digests",
        "dtype",
        "form",
        "lost",
        "plan",
        "source",
        "waiters",
        "waiting",
        "work",
    )

    def __init__(
        self,
        plan: Plan,
        source: Array,
        work: Array,
        reduction: Reduction,
        key: bytes,
        form: Form | None = None,
        lost: Array | None = None,
    ) -> None:
        self.plan = plan
        self.source = source
        self.work = work
        self.dtype = work.dtype
        self.form = form or Form(source.dtype)
        self.lost = lost
        self.waiting = list(plan.waits_for)
        self.waiters: dict[int, Callable[[], None]] = {}
        self.digests = [b""] * len(plan.digests)
        self.awaited = plan.awaited_count
        self._source_at = plan.schedule.input_range[0]
        self._work_at = plan.schedule.work_range[0]
        self._reduction = reduction
        self._key = key
        #: Results in the form in which they are sent, and how often they still will be.
        self._encoded: dict[tuple[int, int], tuple[Array, int]] = {}

    def start(self) -> None:
        """Do the local steps that wait for nothing."""
        for index in self.plan.local:
            if not self.plan.waits_for[index]:
                self._do_locally(index)

    def _of_source(self, start: int, stop: int) -> Array:
        return self.source[start - self._source_at : stop - self._source_at]

    def _of_work(self, start: int, stop: int) -> Array:
        return self.work[start - self._work_at : stop - self._work_at]

    def data_to_send(self, step: Send) -> Array:
        """Return what ``step`` sends, in its form."""
        data = (
            self._of_source(step.start, step.stop)
            if step.source is Space.INPUT
            else self._of_work(step.start, step.stop)
        )
        if self.form.is_plain(step.content):
            return data
        if step.content is not Content.RESULT:
            encoded = self.form.encode(data)
            if self.lost is not None:
                lost = self.lost[step.start : step.stop]
                self.form.decode(encoded, lost)
                with np.errstate(invalid="ignore"):
                    np.subtract(data, lost, out=lost)
            return encoded
        found = self._encoded.get((step.start, step.stop))
        return self.form.encode(data) if found is None else found[0]

    def target(self, message: Incoming) -> Array:
        """Return where ``message`` belongs if it is received into WORK."""
        return self._of_work(message.step.start, message.step.stop)

    def digest_of(self, index: int) -> SegmentDigest | None:
        """Return a new digest for the range of step ``index`` if its values are final, as they are, after it."""
        if index not in self.plan.digests or not self.form.is_plain(Content.RESULT):
            return None
        return SegmentDigest(self._key)

    def take_encoded(self, message: Incoming, data: Array, scratch: Array) -> None:
        """Take a whole message that came as ``data`` in another form. Raises ProtocolError for what cannot be."""
        step = message.step
        if message.reduction is None:
            self.form.decode(data, self._of_work(step.start, step.stop))
        else:
            self.form.decode(data, scratch)
            self.reduce_part(message.reduction, 0, scratch)

    def reduce_part(self, index: int, offset: int, received: Array) -> Array:
        """Do the reduction ``index`` for the elements from ``offset`` of its range on; return the result's."""
        step = self.plan.schedule.steps[index]
        assert isinstance(step, Reduce)
        start = step.start + offset
        stop = start + received.size
        operand = (self._of_source if step.operand is Space.INPUT else self._of_work)(start, stop)
        out = self._of_work(start, stop)
        first, second = (received, operand) if step.received_first else (operand, received)
        self._reduction.combine(first, second, out)
        if step.finish:
            self._reduction.finish(out)
        return out

    def done(self, index: int, digest: SegmentDigest | None = None) -> None:
        """Step ``index`` is done: note its digest if it is final, and let those go on that waited for it.

        ``digest`` is the digest of its range if it was taken along the way.
        """
        plan = self.plan
        step = plan.schedule.steps[index]
        if not self.form.plain:
            self._keep_encoded(step)
        order = plan.digests.get(index)
        if order is not None:
            if digest is not None:
                self.digests[order] = digest.digest()
            else:
                of_result = self._of_source if plan.schedule.result is Space.INPUT else self._of_work
                self.digests[order] = segment_digest(self._key, of_result(step.start, step.stop))
            self.awaited -= 1
        elif not isinstance(step, Send):
            self.awaited -= 1
        waiting = self.waiting
        for later in plan.dependents[index]:
            waiting[later] -= 1
            if not waiting[later]:
                if later in self.waiters:
                    self.waiters.pop(later)()
                elif isinstance(plan.schedule.steps[later], Copy | Accumulate):
                    self._do_locally(later)

    def _keep_encoded(self, step: Step) -> None:
        """Numbers that are complete become what the others will have of them; that is kept until all have it."""
        place = (step.start, step.stop)
        if isinstance(step, Reduce | Accumulate) and step.finish:
            result = self._of_work(*place)
            encoded = self.form.encode(result)
            if self.lost is None:
                self.form.decode(encoded, result)
            else:
                # What the sum loses here is put down to this rank's own part of it, which loses nothing.
                lost = self.lost[step.start : step.stop]
                lost[:] = result
                self.form.decode(encoded, result)
                with np.errstate(invalid="ignore"):
                    np.subtract(lost, result, out=lost)
                    np.multiply(lost, self._reduction.share, out=lost)
            times = self.plan.result_sends.get(place, 0)
            if times:
                self._encoded[place] = (encoded, times)
        elif isinstance(step, Send) and step.content is Content.RESULT and place in self._encoded:
            encoded, times = self._encoded.pop(place)
            if times > 1:
                self._encoded[place] = (encoded, times - 1)

    def result_digests(self) -> list[bytes]:
        """Return the digests of the result, in the order of its ranges; none if ranks do not end with the same."""
        schedule = self.plan.schedule
        if not schedule.replicated:
            return []
        if schedule.cut_alike:
            return self.digests
        return [segment_digest(self._key, self.work)]

    def _do_locally(self, index: int) -> None:
        step = self.plan.schedule.steps[index]
        own, work = self._of_source(step.start, step.stop), self._of_work(step.start, step.stop)
        if isinstance(step, Accumulate):
            self._reduction.combine(work, own, work)
            if step.finish:
                self._reduction.finish(work)
        elif not self.plan.in_place:
            work[:] = own
        self.done(index)


class Outgoing:
    """The next message to a peer: ``header`` and ``data``; say :meth:`Execution.sent` once it is gone."""

    __slots__ = ("data", "header", "index", "lane")

    def __init__(self, lane: Lane, index: int, header: bytes, data: Array) -> None:
        self.lane = lane
        self.index = index
        self.header = header
        self.data = data


class Incoming:
    """The next message that a peer must send, as its ``header`` and ``nbytes``, and where it belongs."""

    __slots__ = ("header", "index", "lane", "nbytes", "reduction", "step")

    def __init__(self, lane: Lane, index: int, reduction: int | None, step: Receive, header: bytes) -> None:
        self.lane = lane
        self.index = index
        self.reduction = reduction
        self.step = step
        self.header = header
        self.nbytes = lane.form.nbytes(step.content, step.stop - step.start)


class Execution:
    """The lanes of one operation, and how far each link has come.

    Attributes
    ----------
    stopped
        Set when the operation has failed: nothing more is sent, what comes is dropped.
    sends_left
        Messages not yet handed to a link.
    bytes_sent
        Payload bytes handed to links.
    small
        Whether it is so little that what cannot be taken yet is held.
    """

    def __init__(self, lanes: Sequence[Lane], epoch: int, operation: int) -> None:
        self.stopped = False
        self.bytes_sent = 0
        self.small = sum(lane.work.nbytes for lane in lanes) <= limits.COLLECTIVE_EAGER_MAX_BYTES
        self._lanes = lanes
        self._whole = 0
        self._key = (epoch, operation)
        self._sends: dict[int, list[tuple[int, int]]] = {}
        self._receives: dict[int, list[tuple[int, int, int | None]]] = {}
        self._sent: dict[int, int] = {}
        self._in_flight: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._eager: dict[int, int] = {}
        for number, lane in enumerate(lanes):
            for peer, sends in lane.plan.sends.items():
                self._sends.setdefault(peer, []).extend((number, index) for index in sends)
            for peer, receives in lane.plan.receives.items():
                self._receives.setdefault(peer, []).extend((number, *pair) for pair in receives)
        self.sends_left = sum(len(sends) for sends in self._sends.values())
        for lane in lanes:
            lane.start()

    @property
    def progress(self) -> float:
        """How much of what this rank sends and receives is done, from 0 to 1."""
        total = sum(map(len, self._sends.values())) + sum(map(len, self._receives.values()))
        done = sum(self._sent.values()) + sum(self._received.values())
        return done / total if total else 1.0

    @property
    def complete(self) -> bool:
        """Whether this rank holds the whole result."""
        # Lanes are done about in their order, and there may be thousands.
        while self._whole < len(self._lanes) and not self._lanes[self._whole].awaited:
            self._whole += 1
        return self._whole == len(self._lanes)

    def digest(self, key: bytes) -> bytes:
        """Return the digest of the whole result."""
        return whole_digest(key, [part for lane in self._lanes for part in lane.result_digests()])

    def next_send(self, peer: int, begun: bool, wake: Callable[[], None]) -> Outgoing | None:
        """Return the next message to ``peer`` if it can be sent now; else ``wake`` is called when to ask again.

        Parameters
        ----------
        peer
            To whom.
        begun
            Whether the peer is known to have begun this operation. Until then only
            ``limits.COLLECTIVE_EAGER_MAX_BYTES`` are sent, which is what a peer holds for an operation it
            has not come to; its Begin is the credit for the rest. (The caller asks again when it comes.)
        wake
            Called at most once.
        """
        position = self._sent.get(peer, 0)
        queue = self._sends.get(peer, ())
        if self.stopped or position >= len(queue):
            return None
        number, index = queue[position]
        lane = self._lanes[number]
        if lane.waiting[index]:
            lane.waiters[index] = wake
            return None
        step = lane.plan.schedule.steps[index]
        assert isinstance(step, Send)
        data = lane.data_to_send(step)
        if not begun:
            eager = self._eager.get(peer, 0) + data.nbytes
            if eager > limits.COLLECTIVE_EAGER_MAX_BYTES:
                return None
            self._eager[peer] = eager
        self._sent[peer] = position + 1
        self._in_flight[peer] = self._in_flight.get(peer, 0) + 1
        return Outgoing(lane, index, encode_data(number, step.round, step.segment, *self._key), data)

    def sent(self, peer: int, message: Outgoing) -> None:
        """``message`` to ``peer`` is with the operating system; its elements may change."""
        if self._in_flight.get(peer):
            self.sends_left -= 1
            self._in_flight[peer] -= 1
        self.bytes_sent += message.data.nbytes
        message.lane.done(message.index)

    def next_receive(self, peer: int, held: int = 0) -> Incoming | None:
        """Return what ``peer`` must send next, ``held`` messages not being taken yet; None if it has sent all."""
        position = self._received.get(peer, 0) + held
        queue = self._receives.get(peer, ())
        if position >= len(queue):
            return None
        number, index, reduction = queue[position]
        lane = self._lanes[number]
        step = lane.plan.schedule.steps[index]
        assert isinstance(step, Receive)
        return Incoming(lane, index, reduction, step, encode_data(number, step.round, step.segment, *self._key))

    def would_block(self, message: Incoming) -> bool:
        """Whether ``message`` has to wait for something, and must not keep others waiting meanwhile."""
        lane = message.lane
        if self.small or not lane.plan.blocks_in_order:
            return bool(lane.waiting[message.index] or self._reduction_waits(message))
        return False

    @staticmethod
    def _reduction_waits(message: Incoming) -> bool:
        # It always waits for its own message.
        return message.reduction is not None and message.lane.waiting[message.reduction] > 1

    async def ready(self, lane: Lane, index: int) -> bool:
        """Wait until step ``index`` may be done; False if the operation was stopped meanwhile."""
        while lane.waiting[index] and not self.stopped:
            event = trio.Event()
            lane.waiters[index] = event.set
            await event.wait()
        return not self.stopped

    def received(self, peer: int, message: Incoming) -> None:
        """``message`` has come and was dealt with."""
        self._received[peer] = self._received.get(peer, 0) + 1

    def expects(self, peer: int) -> bool:
        """Whether ``peer`` still has to send something."""
        return self._received.get(peer, 0) < len(self._receives.get(peer, ()))

    def forget_sends(self, peer: int) -> None:
        """``peer`` is gone and has had all it needs: what was not sent, or not to the end, need not be."""
        queue = self._sends.get(peer, [])
        self.sends_left -= len(queue) - self._sent.get(peer, 0) + self._in_flight.pop(peer, 0)
        self._sent[peer] = len(queue)

    def stop(self) -> None:
        """Give up: wake whoever waits for a step."""
        self.stopped = True
        for lane in self._lanes:
            waiters, lane.waiters = list(lane.waiters.values()), {}
            for wake in waiters:
                wake()


class BufferPool:
    """Keeps large buffers for the next operation: touching fresh memory costs more than reducing into it.

    Holds at most ``limits.COLLECTIVE_BUFFERS_POOLED_MAX_COUNT`` buffers of together at most ``max_bytes``
    (``limits.COLLECTIVE_BUFFERS_POOLED_MAX_BYTES`` if None), the most recently used ones. ``make`` gives new bytes.
    """

    def __init__(
        self,
        make: Callable[[int], Array] = lambda nbytes: np.empty(nbytes, np.uint8),
        max_bytes: int | None = None,
    ) -> None:
        self._make, self._max_bytes = make, max_bytes
        self._free: list[Array] = []

    def take(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Return a vector with undefined contents."""
        nbytes = count * dtype.itemsize
        fitting = [buffer for buffer in self._free if nbytes <= buffer.nbytes <= 2 * nbytes]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free = [buffer for buffer in self._free if buffer is not best]
        else:
            best = self._make(nbytes)
        return best[:nbytes].view(dtype)

    def give(self, vector: Array) -> None:
        """Take back a vector from :meth:`take` that nothing uses any more."""
        buffer = vector
        while isinstance(buffer.base, np.ndarray):
            buffer = buffer.base
        if buffer.nbytes:
            self._free.append(buffer)
        most = limits.COLLECTIVE_BUFFERS_POOLED_MAX_BYTES if self._max_bytes is None else self._max_bytes
        while len(self._free) > limits.COLLECTIVE_BUFFERS_POOLED_MAX_COUNT or self.nbytes > most:
            self._free.pop(0)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(buffer.nbytes for buffer in self._free)
