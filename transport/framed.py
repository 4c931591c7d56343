"""Links over a byte stream that is authenticated and private already: messages, and no encryption of their own.

A message is a *head* (header length, payload length), the header, and the payload as it is. Two heads with header
lengths that no header has are said between messages: a goodbye (an end without one is a lost connection), and, where
links may move, that what follows comes over another link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn, Protocol

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UsageError
from sparkle_mesh.transport.buffers import byte_views, check_header, check_sizes
from sparkle_mesh.transport.link import Buffer, Link, LinkStats
from sparkle_mesh.transport.tcp import HEAD
from sparkle_mesh.transport.turns import Turns

_GOODBYE: Final = HEAD.pack(2**16 - 1, 0)
_MOVED: Final = HEAD.pack(2**16 - 2, 0)


class PeerMoved(Exception):
    """All that the peer sends over this link was received; it goes on over another one."""


class ByteStream(Protocol):
    """What a :class:`FramedLink` runs over. One task may send while another receives."""

    async def send_all(self, buffers: list[memoryview]) -> None:
        """Send every byte; it need not let other tasks run. If cancelled, what was sent is undefined.

        Raises
        ------
        LinkClosedError
            If the peer takes no more, or the stream is closed here.
        """
        ...

    async def receive_some_into(self, view: memoryview) -> int:
        """Wait for bytes, put them into ``view``, return how many; 0 at the end. Cancelling loses nothing.

        Raises
        ------
        LinkClosedError
            If the stream is closed here, or lost.
        """
        ...

    async def aclose(self) -> None:
        """Close; what was sent still arrives. Those who wait get LinkClosedError. Idempotent, never raises."""
        ...

    def abort(self) -> None:
        """Close at once. Those who wait get LinkClosedError. Idempotent, never raises."""
        ...

    def close_in_child(self) -> None:
        """In a forked child: release inherited descriptors with no bytes sent. Never raises."""
        ...


class FramedLink(Link):
    """One end of a link over ``stream``, which it takes over.

    Parameters
    ----------
    stream
        Private, and authenticated to be of ``peer_id``.
    peer_id
        Who is at the other end.
    kind
        Of the link.
    may_move
        Whether :meth:`send_moved` may be called at the other end.
    latency_s
        One way, as measured so far.
    on_released
        Called once, with the link, when its stream is closed.
    """

    def __init__(
        self,
        stream: ByteStream,
        peer_id: str,
        *,
        kind: str,
        may_move: bool = False,
        latency_s: float | None = None,
        on_released: Callable[[Link], None] | None = None,
    ) -> None:
        self.kind = kind
        self.peer_id = peer_id
        self._stats = LinkStats(latency_s=latency_s)
        self._stream = stream
        self._on_released = on_released
        self._closed_because: str | None = None
        self._sends_fail_because: str | None = None
        self._may_move = may_move
        self._peer_moved = False
        self._turns = Turns()
        self._send_budget = limits.LINK_TURN_BYTES
        # Bytes from start to end of the buffer came and were not used yet.
        self._buffer = memoryview(bytearray(limits.LINK_READ_AHEAD_BYTES))
        self._start = 0
        self._end = 0
        self._receiving = False
        self._receive_budget = limits.LINK_TURN_BYTES
        self._payload_left = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} ({self.kind}) to {self.peer_id}{' closed' if self.closed else ''}>"

    # --- Sending ---------------------------------------------------------------------------------

    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        check_header(header)
        views, total = byte_views(buffers) if buffers else ([], 0)
        await self._send_in_turn(HEAD.pack(len(header), total) + header, views, total)
        self._stats.bytes_sent += HEAD.size + len(header) + total
        self._stats.messages_sent += 1

    async def send_moved(self) -> None:
        """Tell the peer that what follows comes over another link; nothing may be sent here after it.

        Raises
        ------
        LinkClosedError
            As for :meth:`send`.
        """
        await self._send_in_turn(_MOVED, [], 0)

    async def _send_in_turn(self, head: bytes, views: list[memoryview], total: int) -> None:
        await self._turns.take()
        try:
            if self._send_budget < 0:
                self._send_budget = limits.LINK_TURN_BYTES
                await trio.lowlevel.checkpoint()
            self._send_budget -= total + limits.LINK_TURN_OPERATION_BYTES
            self._check_can_send()
            await self._send_all(head, views, total)
        finally:
            self._turns.release()

    async def _send_all(self, head: bytes, views: list[memoryview], total: int) -> None:
        if total <= limits.LINK_INLINE_PAYLOAD_MAX_BYTES:
            pieces = [memoryview(b"".join((head, *views)))]
        else:
            pieces = [memoryview(head), *views]
        try:
            await self._stream.send_all(pieces)
        except trio.Cancelled:
            self._abort("a send was cancelled halfway, so that a message may have been cut")
            raise
        except LinkClosedError as error:
            self._check_can_send()
            # What the peer sent before can still be received.
            self._sends_fail_because = f"the connection to peer {self.peer_id} is gone: {error}"
            raise LinkClosedError(self._sends_fail_because) from error

    def _check_can_send(self) -> None:
        reason = self._closed_because or self._sends_fail_because
        if reason is not None:
            raise LinkClosedError(reason)

    # --- Receiving -------------------------------------------------------------------------------

    async def receive_header(self) -> tuple[memoryview, int]:
        self._begin_receiving()
        try:
            if self._payload_left:
                raise UsageError(
                    f"{self._payload_left} bytes of payload are announced and not received; "
                    "receive or discard them first"
                )
            await self._take_turn(limits.LINK_TURN_OPERATION_BYTES)
            await self._fill(HEAD.size)
            header_bytes, payload_bytes = self._parse_head()
            await self._fill(HEAD.size + header_bytes)
        finally:
            self._receiving = False
        start = self._start + HEAD.size
        self._start = start + header_bytes
        self._payload_left = payload_bytes
        self._stats.messages_received += 1
        self._stats.bytes_received += HEAD.size + header_bytes
        return self._buffer[start : self._start], payload_bytes

    def _parse_head(self) -> tuple[int, int]:
        head = self._buffer[self._start : self._start + HEAD.size]
        if head == _GOODBYE:
            self._abort(f"peer {self.peer_id} closed the link")
            self._end_of_link()
        if self._peer_moved:
            self._break("it sent more where it had moved to another link")
        if head == _MOVED and self._may_move:
            self._start += HEAD.size
            after = self._buffer[self._start : self._end]
            if after != _GOODBYE[: len(after)]:
                self._break("it sent more where it had moved to another link")
            self._peer_moved = True
            raise PeerMoved
        header_bytes, payload_bytes = HEAD.unpack(head)
        if header_bytes > limits.LINK_HEADER_MAX_BYTES or payload_bytes > limits.LINK_PAYLOAD_MAX_BYTES:
            self._break(f"it announced a header of {header_bytes} bytes and a payload of {payload_bytes}")
        return header_bytes, payload_bytes

    def _break(self, what: str) -> NoReturn:
        self._abort(f"peer {self.peer_id} broke the protocol: {what}")
        raise ProtocolError(self._closed_because)

    async def receive_into(self, buffers: Sequence[Buffer]) -> None:
        views, total = byte_views(buffers, writable=True)
        self._begin_receiving()
        try:
            check_sizes(total, self._payload_left)
            for view in views:
                await self._receive_payload(view)
        finally:
            self._receiving = False

    async def discard_payload(self) -> None:
        self._begin_receiving()
        try:
            scratch = memoryview(bytearray(min(self._payload_left, limits.LINK_READ_AHEAD_BYTES)))
            while self._payload_left:
                await self._receive_payload(scratch[: self._payload_left])
        finally:
            self._receiving = False

    async def _receive_payload(self, view: memoryview) -> None:
        ready = min(len(view), self._end - self._start)
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        self._count_payload(ready)
        try:
            while ready < len(view):
                await self._take_turn(0)
                count = await self._receive_some(view[ready:])
                ready += count
                self._receive_budget -= count
                self._count_payload(count)
        except trio.Cancelled:
            self._abort("receiving a payload was cancelled halfway")
            raise

    def _count_payload(self, count: int) -> None:
        self._payload_left -= count
        self._stats.bytes_received += count

    async def _take_turn(self, nbytes: int) -> None:
        if self._receive_budget < 0:
            self._receive_budget = limits.LINK_TURN_BYTES
            await trio.lowlevel.checkpoint()
        self._receive_budget -= nbytes

    async def _fill(self, need: int) -> None:
        """Receive until ``need`` bytes are in the buffer, one after the other."""
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + need > len(self._buffer):
            have = self._end - self._start
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
        while self._end - self._start < need:
            self._end += await self._receive_some(self._buffer[self._end :])

    async def _receive_some(self, view: memoryview) -> int:
        try:
            count = await self._stream.receive_some_into(view)
        except LinkClosedError as error:
            self._abort(f"the connection to peer {self.peer_id} is gone: {error}")
            self._end_of_link()
        if not count:
            inside = " in the middle of a message" if self._payload_left or self._start < self._end else ""
            self._abort(f"the connection to peer {self.peer_id} ended{inside} without a goodbye")
            self._end_of_link()
        return count

    def _begin_receiving(self) -> None:
        if self._receiving:
            raise UsageError("another task is receiving on this link; one at a time")
        if self._closed_because is not None:
            raise LinkClosedError(self._closed_because)
        self._receiving = True

    def _end_of_link(self) -> NoReturn:
        raise LinkClosedError(self._closed_because)

    # --- Closing ---------------------------------------------------------------------------------

    def _abort(self, reason: str) -> None:
        """Close the stream at once; tasks that wait for it get LinkClosedError."""
        if self._closed_because is None:
            self._closed_because = reason
            self._stream.abort()
            self._release()

    def _release(self) -> None:
        if self._on_released is not None:
            self._on_released(self)

    async def aclose(self) -> None:
        if self._closed_because is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self._closed_because = "this end of the link was closed"
        # A message that another task has half sent stays cut; a goodbye would be garbage within it.
        if not self._turns.taken and self._sends_fail_because is None:
            with trio.move_on_after(limits.LINK_LINGER_S, shield=True):
                # Perhaps there is nobody any more to say goodbye to.
                with suppress(LinkClosedError):
                    await self._stream.send_all([memoryview(_GOODBYE)])
        await self._stream.aclose()
        self._release()

    @property
    def closed(self) -> bool:
        return self._closed_because is not None or self._sends_fail_because is not None

    def close_in_child(self) -> None:
        self._closed_because = "the link belongs to the parent process"
        self._stream.close_in_child()
