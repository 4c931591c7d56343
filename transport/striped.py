"""Encrypted links over several TCP connections, for ways on which one cannot fill the wire.

One connection gets little of a long way: what TCP sends falls by half when a packet is lost, and grows again by one
segment per round trip. So several carry the payloads, and each recovers by itself.

The first connection is as that of any :class:`TcpLink`: it carries heads, headers and small payloads, in order, and
they never wait behind a large payload. The others are *strands*: a large payload is cut into *stripes*, each goes
over whichever strand takes it, and is decrypted to where it belongs whatever the order in which they come. A stripe
that the receiver has not brought a buffer for waits in its connection; so a sender is never further ahead than what
the kernels hold and one record.

Tasks, not threads, work the strands: such ways are slower than one core by far.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError
from sparkle_mesh.transport.records import RecordOpener, RecordSealer
from sparkle_mesh.transport.strand import STRAND_GOODBYE, Strand, StripePlace
from sparkle_mesh.transport.stripes import Arrivals, Window, stripes
from sparkle_mesh.transport.tcp import CUT_RECEIVING, CUT_SENDING, MESSAGE, TcpLink


class StripedTcpLink(TcpLink):
    """One end of an encrypted link over several connections, which it takes over.

    Parameters
    ----------
    streams
        The connections, two or more, in the order of their numbers, each with the sealer and the opener of this end's
        directions. Those of all but the first have extended prefixes.
    peer_id, latency_s, on_released
        As for :class:`TcpLink`.
    """

    def __init__(
        self,
        streams: Sequence[tuple[trio.SocketStream, RecordSealer, RecordOpener]],
        peer_id: str,
        *,
        latency_s: float | None = None,
        on_released: Callable[[TcpLink], None] | None = None,
    ) -> None:
        first, *others = streams
        super().__init__(first[0], peer_id, first[1], first[2], latency_s=latency_s, on_released=on_released)
        self._strands = [Strand(stream, peer_id, sealer, opener) for stream, sealer, opener in others]
        # Messages with striped payloads so far, per direction.
        self._sent_number = 0
        self._received_number = 0
        # Of the payload that is being received; None if it came with its header.
        self._arrivals: Arrivals | None = None
        self._scattered = memoryview(bytearray())

    def __repr__(self) -> str:
        closed = " closed" if self.closed else ""
        return f"<TcpLink to {self.peer_id} over {1 + len(self._strands)} connections{closed}>"

    # --- Sending ---------------------------------------------------------------------------------

    async def _send_large(self, head: bytes, views: list[memoryview]) -> None:
        length = self._sealer.seal_into(MESSAGE, head, self._tx)
        await self._write(length)
        number = self._sent_number
        self._sent_number += 1
        rest = stripes(views)
        failures: list[LinkClosedError] = []

        async def pump(strand: Strand) -> None:
            try:
                for offset, plaintext in rest:
                    sent_bytes = await strand.send(number, offset, plaintext)
                    self._stats.bytes_sent += sent_bytes
            except LinkClosedError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        done = False
        try:
            async with trio.open_nursery() as nursery:
                # Each time another one is the first, so that messages of one stripe spread as well.
                turn = number % len(self._strands)
                for strand in self._strands[turn:] + self._strands[:turn]:
                    nursery.start_soon(pump, strand)
            done = True
        finally:
            if not done:
                self._abort(CUT_SENDING)
        if failures:
            self._lose_sending(failures[0])

    def _lose_sending(self, error: LinkClosedError) -> NoReturn:
        """A strand takes nothing more: end the others as well, or the peer would wait for what was left in it.

        What the peer sent before can still be received.
        """
        self._check_can_send()
        self._sends_fail_because = str(error)
        for sock in self._sockets():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        raise LinkClosedError(self._sends_fail_because) from error

    # --- Receiving -------------------------------------------------------------------------------

    async def receive_header(self) -> tuple[memoryview, int]:
        header, nbytes = await super().receive_header()
        self._arrivals = None
        if nbytes and not self._opened:
            self._arrivals = Arrivals(self._received_number, nbytes)
            self._received_number += 1
        return header, nbytes

    async def _receive_payload(self, views: list[memoryview] | None, wanted: int) -> None:
        arrivals = self._arrivals
        if arrivals is None or not wanted:
            await super()._receive_payload(views, wanted)
            return
        window = Window(arrivals.total_bytes - self._payload_left, wanted, views)
        if self._opened:
            # The rest of the stripe over the end of the last window.
            self._opened = window.put(window.start, self._opened)
        done = False
        try:
            if window.missing_bytes:
                await self._gather(arrivals, window)
            done = True
        except ProtocolError as error:
            self._fail(error)
        except LinkClosedError as error:
            self._abort(str(error))
            self._end_of_link()
        finally:
            if not done:
                self._abort(CUT_RECEIVING)
        self._payload_left -= wanted

    async def _gather(self, arrivals: Arrivals, window: Window) -> None:
        """Receive what ``window`` still misses, from all strands."""
        failures: list[LinkClosedError | ProtocolError] = []
        waiting = 0

        async def drain(strand: Strand) -> None:
            nonlocal waiting
            try:
                while window.missing_bytes:
                    place = None if strand.ended else await strand.next_place()
                    if place is not None and place.kind == STRAND_GOODBYE:
                        await strand.receive_rest()
                        strand.open_into(self._scattered[:0])
                        strand.ended = True
                    elif place is not None and arrivals.is_due(place.number, place.offset, place.length, window.end):
                        await strand.receive_rest()
                        self._open_stripe(strand, place, arrivals, window)
                    else:
                        # It has nothing more for this window, because places ascend in every strand.
                        waiting += 1
                        if waiting == len(self._strands):
                            raise ProtocolError(
                                f"{window.missing_bytes} bytes of message {arrivals.number} did not come, and the "
                                "connections are past them"
                            )
                        return
                nursery.cancel_scope.cancel()
            except (LinkClosedError, ProtocolError) as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for strand in self._strands:
                nursery.start_soon(drain, strand)
        if failures:
            raise failures[0]

    def _open_stripe(self, strand: Strand, place: StripePlace, arrivals: Arrivals, window: Window) -> None:
        """Decrypt the record at the front of ``strand`` to where it belongs."""
        target = window.place(place.offset, place.length)
        if target is not None:
            self._stats.bytes_received += strand.open_into(target)
            window.missing_bytes -= place.length
        else:
            beyond = place.offset + place.length > window.end
            # What is left of the one that is over the end stays in its buffer until it is asked for.
            buffer = self._scratch if beyond else self._scattered
            if len(buffer) < place.length:
                buffer = memoryview(bytearray(limits.LINK_STRIPE_BYTES))
                if beyond:
                    self._scratch = buffer
                else:
                    self._scattered = buffer
            data = buffer[: place.length]
            self._stats.bytes_received += strand.open_into(data)
            rest = window.put(place.offset, data)
            if beyond:
                self._opened = rest
        arrivals.add(place.offset)

    # --- Closing ---------------------------------------------------------------------------------

    def _sockets(self) -> list[socket.socket]:
        return [self._sock, *(strand.sock for strand in self._strands)]

    def _release(self) -> None:
        for strand in self._strands:
            strand.close()
        super()._release()

    async def _linger(self) -> None:
        whole = not self._turns.taken and self._sends_fail_because is None
        for strand in self._strands:
            strand.wake()
        with trio.move_on_after(limits.LINK_LINGER_S, shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(super()._linger)
                for strand in self._strands:
                    nursery.start_soon(partial(strand.finish, self._sent_number, whole=whole))

    def close_in_child(self) -> None:
        super().close_in_child()
        for strand in self._strands:
            strand.close_in_child()
