"""One connection of a link that has several: it carries stripes of payloads, both ways."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple, NoReturn

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError
from sparkle_mesh.transport.records import (
    PLACE,
    PLACED_PREFIX_BYTES,
    PREFIX_BYTES,
    RecordOpener,
    RecordSealer,
    parse_prefix,
)
from sparkle_mesh.transport.sockets import NO_SIGNAL, limit_unsent, linger, take_socket

STRIPE: Final = 4
#: The last record of a strand; its place is that of a message that does not come any more.
STRAND_GOODBYE: Final = 5


class StripePlace(NamedTuple):
    """What the prefix of a record tells. It is not authenticated before the record is opened."""

    kind: int
    length: int
    number: int
    offset: int


class Strand:
    """Sends and receives the records of one connection, which it takes over.

    One task may send while another receives. Whoever calls closes the link if it raises.

    Parameters
    ----------
    stream
        A connected stream from which nothing but records will come.
    peer_id
        Of the other end, for messages.
    sealer, opener
        Of this end's two directions, with extended prefixes.
    """

    def __init__(self, stream: trio.SocketStream, peer_id: str, sealer: RecordSealer, opener: RecordOpener) -> None:
        self.sock = take_socket(stream)
        limit_unsent(self.sock)
        self._peer_id = peer_id
        self._sealer = sealer
        self._opener = opener
        # Made when they are first needed: many links carry large payloads one way only, or never.
        self._tx = memoryview(bytearray())
        self._rx = memoryview(bytearray())
        self._held = 0
        self._low_water = 1
        self._place: StripePlace | None = None
        #: The peer has said that nothing will come any more.
        self.ended = False

    # --- Sending ---------------------------------------------------------------------------------

    async def send(self, number: int, offset: int, plaintext: memoryview | bytes) -> int:
        """Send the stripe at ``offset`` of message ``number``; return the bytes that took.

        Raises
        ------
        LinkClosedError
            If the connection is gone or was closed.
        """
        if not self._tx:
            self._tx = memoryview(bytearray(limits.LINK_STRIPE_BYTES + self._sealer.overhead_bytes))
        length = self._sealer.seal_into(STRIPE, plaintext, self._tx, PLACE.pack(number, offset))
        await self._write(self._tx[:length])
        return length

    async def _write(self, record: memoryview) -> None:
        # Whoever sends the other stripes gets its turn, so that they spread.
        waited = False
        while True:
            try:
                record = record[self.sock.send(record, NO_SIGNAL) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._gone(error)
            if not record:
                break
            await self._wait(trio.lowlevel.wait_writable)
            waited = True
        if not waited:
            await trio.lowlevel.checkpoint()

    # --- Receiving -------------------------------------------------------------------------------

    async def next_place(self) -> StripePlace:
        """Wait for the prefix of the next record; return what it says. Cancelling it loses nothing.

        Raises
        ------
        LinkClosedError
            If the connection is gone, ended without a goodbye, or was closed.
        ProtocolError
            If no such record can be.
        """
        if self._place is None:
            await self._fill(PLACED_PREFIX_BYTES)
            kind, length = parse_prefix(self._rx[:PREFIX_BYTES])
            if not (kind == STRIPE and 0 < length <= limits.LINK_STRIPE_BYTES) and (kind, length) != (
                STRAND_GOODBYE,
                0,
            ):
                raise ProtocolError(
                    f"a record of kind {kind} and {length} bytes came where one of kind {STRIPE} and 1 to "
                    f"{limits.LINK_STRIPE_BYTES} bytes belongs"
                )
            number, offset = PLACE.unpack_from(self._rx, PREFIX_BYTES)
            self._place = StripePlace(kind, length, number, offset)
        return self._place

    async def receive_rest(self) -> None:
        """Wait until the record that :meth:`next_place` told of is here. Cancelling it loses nothing."""
        assert self._place is not None
        await self._fill(self._place.length + self._opener.overhead_bytes)

    def open_into(self, out: memoryview) -> int:
        """Decrypt the record that is here; return the bytes it took.

        Raises
        ------
        AuthenticationError
            If it is not the one that the peer sealed next, for this place.
        """
        assert self._place is not None
        end = self._place.length + self._opener.overhead_bytes
        self._opener.open_into(self._rx[:end], out)
        # At most the next record's prefix.
        self._rx[: self._held - end] = self._rx[end : self._held]
        self._held -= end
        self._place = None
        return end

    async def _fill(self, need: int) -> None:
        """Receive until ``need`` bytes are here, and the prefix of what follows if it is there."""
        if not self._rx:
            most = limits.LINK_STRIPE_BYTES + self._opener.overhead_bytes + PLACED_PREFIX_BYTES
            self._rx = memoryview(bytearray(most))
        waited = False
        while self._held < need:
            try:
                count = self.sock.recv_into(self._rx[self._held : need + PLACED_PREFIX_BYTES])
            except BlockingIOError:
                self._set_low_water(need - self._held)
                await self._wait(trio.lowlevel.wait_readable)
                waited = True
                continue
            except OSError as error:
                self._gone(error)
            if not count:
                inside = " in the middle of a record" if self._held else ""
                raise LinkClosedError(f"one of the connections to peer {self._peer_id} ended{inside} without a goodbye")
            self._held += count
        if not waited and need > PLACED_PREFIX_BYTES:
            await trio.lowlevel.checkpoint()

    def _set_low_water(self, missing: int) -> None:
        """Be woken once for the rest of a record, and not for every packet of it."""
        if missing != self._low_water:
            self._low_water = missing
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await wait(self.sock)
        except trio.ClosedResourceError as error:
            raise LinkClosedError("the link was closed") from error

    def _gone(self, error: OSError) -> NoReturn:
        raise LinkClosedError(
            f"one of the connections to peer {self._peer_id} is gone: {error.strerror or error}"
        ) from error

    # --- Closing ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let tasks that wait for this connection go on, to LinkClosedError."""
        if self.sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self.sock)

    def close(self) -> None:
        """Close at once."""
        self.wake()
        self.sock.close()

    async def finish(self, number: int, *, whole: bool) -> None:
        """Say goodbye if all that was sent is ``whole``, and wait until it has arrived; the caller has a deadline."""
        with suppress(OSError, LinkClosedError):
            if whole:
                record = memoryview(bytearray(self._sealer.overhead_bytes))
                self._sealer.seal_into(STRAND_GOODBYE, b"", record, PLACE.pack(number, 0))
                await self._write(record)
            self.sock.shutdown(socket.SHUT_WR)
            await linger(self.sock, memoryview(bytearray(limits.LINK_STRIPE_BYTES)))

    def close_in_child(self) -> None:
        """In a forked child: let go of the descriptor, sending nothing. Never raises."""
        descriptor = self.sock.detach()
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)
