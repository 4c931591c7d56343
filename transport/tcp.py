"""Encrypted links over one TCP connection: the path that gradients take.

A message begins with a record of kind MESSAGE that holds the *head* (header length, payload length), the header, and
the payload if it is small. A larger payload follows in records of kind PAYLOAD, each of which is decrypted from the
receive buffer straight to where it belongs. A GOODBYE record ends the link; an end without one is a lost connection.

What it costs decides how fast collectives are, so, measured on loopback:

- A system call is tried before its readiness is waited for: on a busy link it mostly succeeds, and a wait is a turn
  of the scheduler with two system calls of its own.
- While the rest of a large record is awaited, ``SO_RCVLOWAT`` asks to be woken once for all of it.
- Large records are received to their end and little further, so that next to nothing is left over to be moved.
- Buffers are as large as the records that came by, so that an idle link to one of many peers costs little.
- The kernel tunes the socket buffers: every fixed size that was tried was slower.

Operations that need not wait let other tasks run every ``limits.LINK_TURN_BYTES`` or so, and not each time.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UsageError
from sparkle_mesh.transport.buffers import byte_views, check_header, check_sizes, grown, payload_records, scatter
from sparkle_mesh.transport.link import Buffer, Link, LinkStats
from sparkle_mesh.transport.path_meter import PathMeter
from sparkle_mesh.transport.records import (
    PREFIX_BYTES,
    RECORD_OVERHEAD_MAX_BYTES,
    RecordOpener,
    RecordSealer,
    parse_prefix,
)
from sparkle_mesh.transport.sockets import NO_SIGNAL, linger, pace_socket, take_socket
from sparkle_mesh.transport.turns import Turns

MESSAGE: Final = 1
PAYLOAD: Final = 2
GOODBYE: Final = 3

CUT_SENDING: Final = "a send was cancelled halfway, so that a message may have been cut"
CUT_RECEIVING: Final = "receiving a payload was cancelled halfway"

#: Header bytes and payload bytes.
HEAD: Final = struct.Struct(">HQ")
_MESSAGE_RECORD_MAX_BYTES: Final = HEAD.size + limits.LINK_HEADER_MAX_BYTES + limits.LINK_INLINE_PAYLOAD_MAX_BYTES
_RX_INITIAL_BYTES: Final = limits.LINK_READ_AHEAD_BYTES + _MESSAGE_RECORD_MAX_BYTES
_PAYLOAD_READ_AHEAD_BYTES: Final = 4 * limits.KIB


class TcpLink(Link):
    """One end of an encrypted link over ``stream``, which it takes over.

    Parameters
    ----------
    stream
        A connected stream from which nothing but records will come.
    peer_id
        The identity that the keys were agreed on with.
    sealer, opener
        Of this end's two directions.
    latency_s
        One way, as measured so far.
    on_released
        Called once, with the link, when its socket is closed.
    """

    kind = "tcp"

    def __init__(
        self,
        stream: trio.SocketStream,
        peer_id: str,
        sealer: RecordSealer,
        opener: RecordOpener,
        *,
        latency_s: float | None = None,
        on_released: Callable[[TcpLink], None] | None = None,
    ) -> None:
        self.peer_id = peer_id
        self._on_released = on_released
        self._stats = LinkStats()
        self._path = PathMeter(latency_s)
        self._pace: float | None = None
        # The plain socket beneath trio's: its methods are what the hot path calls.
        self._sock = take_socket(stream)
        self._sealer = sealer
        self._opener = opener
        self._closed_because: str | None = None
        self._sends_fail_because: str | None = None
        # Sending.
        self._tx = memoryview(bytearray(_MESSAGE_RECORD_MAX_BYTES + RECORD_OVERHEAD_MAX_BYTES))
        self._turns = Turns()
        self._send_budget = limits.LINK_TURN_BYTES
        # Receiving: bytes from start to end of the buffer came and were not used yet.
        self._rx = memoryview(bytearray(_RX_INITIAL_BYTES))
        self._start = 0
        self._end = 0
        self._low_water = 1
        self._receiving = False
        self._receive_budget = limits.LINK_TURN_BYTES
        self._message = memoryview(bytearray(_MESSAGE_RECORD_MAX_BYTES))
        # Payload that is decrypted and not taken yet.
        self._opened = self._message[:0]
        self._payload_left = 0
        self._scratch = memoryview(bytearray())

    def __repr__(self) -> str:
        return f"<TcpLink to {self.peer_id}{' closed' if self.closed else ''}>"

    @property
    def stats(self) -> LinkStats:
        self._path.measure(self._sockets())
        self._stats.latency_s = self._path.latency_s
        self._stats.bandwidth_bytes_per_s = self._path.bandwidth_bytes_per_s
        return self._stats

    def _sockets(self) -> list[socket.socket]:
        """Return all sockets of the link, the first one's first."""
        return [self._sock]

    def pace(self, bytes_per_s: float | None) -> None:
        if bytes_per_s != self._pace and not self.closed:
            self._pace = bytes_per_s
            sockets = self._sockets()
            # Of several the first carries no large payloads.
            carrying = max(len(sockets) - 1, 1)
            for sock in sockets:
                pace_socket(sock, None if bytes_per_s is None else bytes_per_s / carrying)

    # --- Sending ---------------------------------------------------------------------------------

    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        await self.send_all(((header, buffers),))

    async def send_all(self, messages: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        checked = []
        for header, buffers in messages:
            check_header(header)
            checked.append((header, *(byte_views(buffers) if buffers else ([], 0))))
        await self._turns.take()
        try:
            if self._send_budget < 0:
                self._send_budget = limits.LINK_TURN_BYTES
                await trio.lowlevel.checkpoint()
            self._send_budget -= sum(total for _, _, total in checked) + limits.LINK_TURN_OPERATION_BYTES
            self._check_can_send()
            await self._send_messages(checked)
        finally:
            self._turns.release()

    async def _send_messages(self, messages: list[tuple[bytes, list[memoryview], int]]) -> None:
        length = 0
        try:
            for header, views, total in messages:
                head = HEAD.pack(len(header), total) + header
                if total > limits.LINK_INLINE_PAYLOAD_MAX_BYTES:
                    await self._write(length)
                    length = 0
                    await self._send_large(head, views)
                    continue
                data = b"".join((head, *views)) if total else head
                if length + len(data) + self._sealer.overhead_bytes > len(self._tx):
                    await self._write(length)
                    length = 0
                length += self._sealer.seal_into(MESSAGE, data, self._tx[length:])
            await self._write(length)
        except trio.Cancelled:
            self._abort(CUT_SENDING)
            raise
        self._stats.messages_sent += len(messages)

    async def _send_large(self, head: bytes, views: list[memoryview]) -> None:
        """Send a message whose payload takes records of its own; the first travels with the head."""
        length = self._sealer.seal_into(MESSAGE, head, self._tx)
        for plaintext in payload_records(views):
            end = length + len(plaintext) + self._sealer.overhead_bytes
            if end > len(self._tx):
                self._tx = grown(self._tx, end, length)
            self._sealer.seal_into(PAYLOAD, plaintext, self._tx[length:])
            await self._write(end)
            length = 0

    async def _write(self, length: int) -> None:
        """Send ``length`` bytes of the transmit buffer."""
        self._stats.bytes_sent += length
        sent = 0
        while sent < length:
            try:
                sent += self._sock.send(self._tx[sent:length], NO_SIGNAL)
            except BlockingIOError:
                pass
            except OSError as error:
                self._check_can_send()
                # What the peer sent before can still be received.
                self._sends_fail_because = f"the connection to peer {self.peer_id} is gone: {error.strerror or error}"
                raise LinkClosedError(self._sends_fail_because) from error
            if sent == length:
                return
            try:
                await trio.lowlevel.wait_writable(self._sock)
            except trio.ClosedResourceError:
                self._check_can_send()
                raise
            self._send_budget = limits.LINK_TURN_BYTES

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
            if self._receive_budget < 0:
                self._receive_budget = limits.LINK_TURN_BYTES
                await trio.lowlevel.checkpoint()
            self._receive_budget -= limits.LINK_TURN_OPERATION_BYTES
            length = await self._await_record(MESSAGE, HEAD.size, _MESSAGE_RECORD_MAX_BYTES)
            message = self._message[:length]
            self._open(length, message)
            header_bytes, payload_bytes = HEAD.unpack_from(message)
            header_end = HEAD.size + header_bytes
            inline = message[header_end:]
            if (
                header_end > length
                or header_bytes > limits.LINK_HEADER_MAX_BYTES
                or payload_bytes > limits.LINK_PAYLOAD_MAX_BYTES
                or (inline and len(inline) != payload_bytes)
            ):
                raise ProtocolError(
                    f"a record of {length} bytes announced a header of {header_bytes} bytes and a payload "
                    f"of {payload_bytes}"
                )
        except ProtocolError as error:
            self._fail(error)
        finally:
            self._receiving = False
        self._opened = inline
        self._payload_left = payload_bytes
        self._stats.messages_received += 1
        return message[HEAD.size : header_end], payload_bytes

    async def receive_into(self, buffers: Sequence[Buffer]) -> None:
        views, total = byte_views(buffers, writable=True)
        self._begin_receiving()
        try:
            check_sizes(total, self._payload_left)
            await self._receive_payload(views, total)
        finally:
            self._receiving = False

    async def discard_payload(self) -> None:
        self._begin_receiving()
        try:
            await self._receive_payload(None, self._payload_left)
        finally:
            self._receiving = False

    async def _receive_payload(self, views: list[memoryview] | None, wanted: int) -> None:
        """Receive ``wanted`` bytes of payload into ``views``, or to nowhere."""
        index = offset = 0
        try:
            while wanted:
                data = self._opened[:wanted]
                if not data:
                    if self._receive_budget < 0:
                        self._receive_budget = limits.LINK_TURN_BYTES
                        await trio.lowlevel.checkpoint()
                    length = await self._await_record(PAYLOAD, 1, min(self._payload_left, limits.RECORD_MAX_BYTES))
                    self._receive_budget -= length
                    if views is not None and length <= len(views[index]) - offset:
                        # The way that large payloads take: straight to where they belong.
                        self._open(length, views[index][offset : offset + length])
                        offset += length
                        if offset == len(views[index]):
                            index, offset = index + 1, 0
                        self._payload_left -= length
                        wanted -= length
                        continue
                    if length > len(self._scratch):
                        self._scratch = memoryview(bytearray(length))
                    self._opened = self._scratch[:length]
                    self._open(length, self._opened)
                    data = self._opened[:wanted]
                if views is not None:
                    index, offset = scatter(data, views, index, offset)
                self._opened = self._opened[len(data) :]
                self._payload_left -= len(data)
                wanted -= len(data)
        except trio.Cancelled:
            self._abort(CUT_RECEIVING)
            raise
        except ProtocolError as error:
            self._fail(error)

    def _begin_receiving(self) -> None:
        if self._receiving:
            raise UsageError("another task is receiving on this link; one at a time")
        if self._closed_because is not None:
            raise LinkClosedError(self._closed_because)
        self._receiving = True

    async def _await_record(self, kind: int, least_bytes: int, most_bytes: int) -> int:
        """Wait until the next record is in the buffer, whole; return the length of its plaintext.

        Cancelling it loses nothing.
        """
        if self._end - self._start < PREFIX_BYTES:
            await self._fill(PREFIX_BYTES, limits.LINK_READ_AHEAD_BYTES)
        got, length = parse_prefix(self._rx[self._start : self._start + PREFIX_BYTES])
        if got == GOODBYE and kind == MESSAGE and not length:
            await self._fill(self._opener.overhead_bytes, 0)
            self._open(0, self._message[:0])
            self._abort(f"peer {self.peer_id} closed the link")
            self._end_of_link()
        if got != kind or not least_bytes <= length <= most_bytes:
            # Not authenticated yet, and wrong whoever wrote it.
            raise ProtocolError(
                f"a record of kind {got} and {length} bytes came where one of kind {kind} and "
                f"{least_bytes} to {most_bytes} bytes belongs"
            )
        need = length + self._opener.overhead_bytes
        if self._end - self._start < need:
            await self._fill(need, _PAYLOAD_READ_AHEAD_BYTES)
        return length

    def _open(self, length: int, out: memoryview) -> None:
        """Decrypt the record at the front of the buffer and take it off."""
        start = self._start
        end = start + length + self._opener.overhead_bytes
        self._opener.open_into(self._rx[start:end], out)
        self._stats.bytes_received += end - start
        self._start = end

    async def _fill(self, need: int, ahead: int) -> None:
        """Receive until the buffer holds ``need`` bytes, and up to ``ahead`` more if they are there."""
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + need > len(self._rx):
            have = self._end - self._start
            if need > len(self._rx):
                self._rx = grown(self._rx[self._start :], need + limits.LINK_READ_AHEAD_BYTES, have)
            else:
                self._rx[:have] = self._rx[self._start : self._end]
            self._start, self._end = 0, have
        limit = min(self._start + need + ahead, len(self._rx))
        while self._end - self._start < need:
            try:
                count = self._sock.recv_into(self._rx[self._end : limit])
            except BlockingIOError:
                await self._wait_readable(need - (self._end - self._start))
                continue
            except OSError as error:
                self._abort(f"the connection to peer {self.peer_id} is gone: {error.strerror or error}")
                self._end_of_link()
            if not count:
                inside = " in the middle of a message" if self._payload_left or self._start < self._end else ""
                self._abort(f"the connection to peer {self.peer_id} ended{inside} without a goodbye")
                self._end_of_link()
            self._end += count

    async def _wait_readable(self, missing: int) -> None:
        if self._closed_because is not None:
            # Closed between this task's being woken and its turn: what is left belongs to the linger.
            self._end_of_link()
        low_water = missing if missing >= limits.LINK_LOW_WATER_MIN_BYTES else 1
        if low_water != self._low_water:
            self._low_water = low_water
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
        try:
            await trio.lowlevel.wait_readable(self._sock)
        except trio.ClosedResourceError:
            self._end_of_link()
        self._receive_budget = limits.LINK_TURN_BYTES

    def _end_of_link(self) -> NoReturn:
        raise LinkClosedError(self._closed_because)

    # --- Closing ---------------------------------------------------------------------------------

    def _fail(self, error: ProtocolError) -> NoReturn:
        """The peer broke the protocol: end the link, and tell the caller who it was."""
        self._abort(f"peer {self.peer_id} broke the protocol: {error}")
        raise type(error)(self._closed_because) from error

    def _abort(self, reason: str) -> None:
        """Close the socket at once; tasks that wait for it get LinkClosedError."""
        if self._closed_because is None:
            self._closed_because = reason
            trio.lowlevel.notify_closing(self._sock)
            self._release()

    def _release(self) -> None:
        self._sock.close()
        if self._on_released is not None:
            self._on_released(self)

    async def aclose(self) -> None:
        if self._closed_because is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self._closed_because = "this end of the link was closed"
        with suppress(OSError):
            # A message that another task has half sent stays cut; a goodbye would be garbage within it.
            if not self._turns.taken and self._sends_fail_because is None:
                self._sock.send(self._tx[: self._sealer.seal_into(GOODBYE, b"", self._tx)], NO_SIGNAL)
        trio.lowlevel.notify_closing(self._sock)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            await self._linger()
        self._release()

    async def _linger(self) -> None:
        """Wait a moment for what was sent to arrive; closing earlier, with bytes unread here, would drop it.

        Shielded, because the last thing that a member says must get through when its work was cancelled.
        """
        with trio.move_on_after(limits.LINK_LINGER_S, shield=True):
            await linger(self._sock, self._rx)

    @property
    def closed(self) -> bool:
        return self._closed_because is not None or self._sends_fail_because is not None

    def close_in_child(self) -> None:
        self._closed_because = "the link belongs to the parent process"
        descriptor = self._sock.detach()
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)
