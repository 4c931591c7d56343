"""Links inside one process, for tests and simulations: delay, rate, partition and loss, exact under a virtual clock.

Each direction is a pipe: a queue of pieces with the time at which each arrives. A piece leaves once those before it
have left at the pipe's rate, and arrives ``delay_s`` later. What was sent and not yet received is bounded by the
pipe's capacity, as TCP's is by its window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, UsageError
from sparkle_mesh.transport.buffers import byte_views, check_header, check_sizes
from sparkle_mesh.transport.link import Buffer, Link, LinkStats

# What a message's header costs beside its own bytes, so that empty messages are bounded too.
_MESSAGE_OVERHEAD_BYTES: Final = 16


@dataclass(slots=True)
class _Piece:
    """Part of the stream: the beginning of a message (``nbytes`` of payload follow), payload, or the end."""

    data: bytes
    cost_bytes: int
    sent_at: float
    arrives_at: float
    #: None for payload.
    nbytes: int | None = None
    end: bool = False


class _Pipe:
    """One direction."""

    def __init__(self, delay_s: float, rate_bytes_per_s: float | None, capacity_bytes: int) -> None:
        self._delay_s = delay_s
        self._rate = rate_bytes_per_s
        self._capacity_bytes = capacity_bytes
        self.least_room_bytes = capacity_bytes // 4
        self._pieces: deque[_Piece] = deque()
        self._held_bytes = 0
        self._left_at = 0.0
        self._partitioned_at: float | None = None
        self.end: _Piece | None = None
        # Both ends' tasks wait here for any change.
        self.changed = trio.lowlevel.ParkingLot()

    @property
    def room_bytes(self) -> int:
        return self._capacity_bytes - self._held_bytes

    def put(self, data: bytes, cost_bytes: int, *, nbytes: int | None = None, end: bool = False) -> None:
        now = trio.current_time()
        self._left_at = max(now, self._left_at) + (cost_bytes / self._rate if self._rate else 0.0)
        piece = _Piece(data, cost_bytes, now, self._left_at + self._delay_s, nbytes, end)
        self._pieces.append(piece)
        self._held_bytes += cost_bytes
        if end:
            self.end = piece
        self.changed.unpark_all()

    def arrived(self, piece: _Piece) -> bool:
        limit = trio.current_time() if self._partitioned_at is None else self._partitioned_at
        return piece.arrives_at <= limit

    def peek(self) -> _Piece | None:
        """Return the next piece if it has arrived."""
        if self._pieces and self.arrived(self._pieces[0]):
            return self._pieces[0]
        return None

    def take(self) -> None:
        self._held_bytes -= self._pieces.popleft().cost_bytes
        self.changed.unpark_all()

    async def wait_arrival(self) -> None:
        """Wait until the next piece arrives or something changes."""
        if self._pieces and self._partitioned_at is None:
            with trio.move_on_at(self._pieces[0].arrives_at):
                await self.changed.park()
        else:
            await self.changed.park()

    def lose(self) -> None:
        """Drop what is in flight."""
        self._pieces.clear()
        self._held_bytes = 0
        self.changed.unpark_all()

    def partition(self) -> None:
        if self._partitioned_at is None:
            self._partitioned_at = trio.current_time()
            self.changed.unpark_all()

    def heal(self) -> None:
        if self._partitioned_at is None:
            return
        now = trio.current_time()
        cut_at, self._partitioned_at = self._partitioned_at, None
        latest = now
        for piece in self._pieces:
            if piece.arrives_at > cut_at:
                # The time on the wire that was left when the cable was pulled is still to come.
                latest = max(latest, piece.arrives_at + now - max(cut_at, piece.sent_at))
                piece.arrives_at = latest
        self._left_at = max(self._left_at, latest - self._delay_s)
        self.changed.unpark_all()


class MemoryLink(Link):
    """One end of a :func:`memory_link_pair`."""

    kind = "memory"

    def __init__(self, peer_id: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.peer_id = peer_id
        self._stats = LinkStats()
        self._incoming = incoming
        self._outgoing = outgoing
        self._turn = trio.Lock()
        self._receiving = False
        self._payload_left = 0
        # Payload that was taken from the pipe and not asked for yet.
        self._taken = memoryview(b"")
        self._peer_closed = False
        self._closed_because: str | None = None

    def __repr__(self) -> str:
        return f"<MemoryLink to {self.peer_id}{' closed' if self.closed else ''}>"

    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        check_header(header)
        views, total = byte_views(buffers)
        async with self._turn:
            try:
                await self._put(bytes(header), nbytes=total)
                for view in views:
                    offset = 0
                    while offset < len(view):
                        # Not for every byte of room, or pieces would get ever smaller.
                        room = await self._wait_room(min(len(view) - offset, self._outgoing.least_room_bytes))
                        piece = bytes(view[offset : offset + room])
                        self._outgoing.put(piece, len(piece))
                        offset += len(piece)
            except trio.Cancelled:
                self._close("a send was cancelled halfway")
                raise
        self._stats.messages_sent += 1
        self._stats.bytes_sent += len(header) + total

    async def _put(self, header: bytes, *, nbytes: int) -> None:
        cost_bytes = len(header) + _MESSAGE_OVERHEAD_BYTES
        await self._wait_room(cost_bytes)
        self._outgoing.put(header, cost_bytes, nbytes=nbytes)

    async def _wait_room(self, nbytes: int) -> int:
        while True:
            self._check_open()
            end = self._incoming.end
            if end is not None and self._incoming.arrived(end):
                # What the peer had sent before can still be received.
                self._peer_closed = True
                raise LinkClosedError(f"peer {self.peer_id} closed the link")
            if self._outgoing.room_bytes >= nbytes:
                return self._outgoing.room_bytes
            with trio.move_on_at(end.arrives_at if end is not None else float("inf")):
                await self._outgoing.changed.park()

    async def receive_header(self) -> tuple[memoryview, int]:
        self._check_open()
        if self._payload_left:
            raise UsageError(
                f"{self._payload_left} bytes of payload are announced and not received; receive or discard them first"
            )
        self._begin_receiving()
        try:
            await trio.lowlevel.checkpoint()
            piece = await self._wait_piece()
            assert piece.nbytes is not None
            self._incoming.take()
        finally:
            self._receiving = False
        self._payload_left = piece.nbytes
        self._stats.messages_received += 1
        self._stats.bytes_received += len(piece.data) + piece.nbytes
        return memoryview(piece.data), piece.nbytes

    async def receive_into(self, buffers: Sequence[Buffer]) -> None:
        views, total = byte_views(buffers, writable=True)
        self._check_open()
        check_sizes(total, self._payload_left)
        await self._receive_payload(deque(views), total)

    async def discard_payload(self) -> None:
        await self._receive_payload(None, self._payload_left)

    async def _receive_payload(self, views: deque[memoryview] | None, wanted: int) -> None:
        self._begin_receiving()
        try:
            await trio.lowlevel.checkpoint()
            while wanted:
                if not self._taken:
                    self._taken = memoryview((await self._wait_piece()).data)
                    self._incoming.take()
                data = self._taken[:wanted]
                self._taken = self._taken[len(data) :]
                self._payload_left -= len(data)
                wanted -= len(data)
                if views is not None:
                    _scatter(data, views)
        except trio.Cancelled:
            self._close("receiving a payload was cancelled halfway")
            raise
        finally:
            self._receiving = False

    def _begin_receiving(self) -> None:
        if self._receiving:
            raise UsageError("another task is receiving on this link; one at a time")
        self._receiving = True

    async def _wait_piece(self) -> _Piece:
        while True:
            self._check_open()
            piece = self._incoming.peek()
            if piece is not None and not piece.end:
                return piece
            if piece is not None:
                self._close(f"peer {self.peer_id} closed the link")
            else:
                await self._incoming.wait_arrival()

    def _check_open(self) -> None:
        if self._closed_because is not None:
            raise LinkClosedError(self._closed_because)

    def _close(self, reason: str) -> None:
        if self._closed_because is None:
            self._closed_because = reason
            self._outgoing.put(b"", 0, end=True)
            # Nobody will read it here; a peer that waits for room learns that it need not.
            self._incoming.lose()

    async def aclose(self) -> None:
        self._close("this end of the link was closed")
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()

    @property
    def closed(self) -> bool:
        return self._peer_closed or self._closed_because is not None

    def close_in_child(self) -> None:
        """Nothing is inherited: the link is this process's own memory."""

    # --- Faults ----------------------------------------------------------------------------------

    def drop(self) -> None:
        """Lose the connection: both ends notice at once, what is in flight is lost."""
        for pipe in (self._incoming, self._outgoing):
            pipe.lose()
        for link in self._ends:
            if link._closed_because is None:
                link._closed_because = "the connection was lost"

    def partition(self) -> None:
        """Let nothing arrive at either end until :meth:`heal`; sends go on until the capacity is full."""
        self._incoming.partition()
        self._outgoing.partition()

    def heal(self) -> None:
        """End a partition; what was on its way goes on. Does nothing if there is none."""
        self._incoming.heal()
        self._outgoing.heal()

    _ends: tuple[MemoryLink, MemoryLink]


def _scatter(data: memoryview, views: deque[memoryview]) -> None:
    """Move ``data`` to the front of ``views``, which keep what is not yet filled."""
    while data:
        view = views.popleft()
        count = min(len(data), len(view))
        view[:count] = data[:count]
        data = data[count:]
        if count < len(view):
            views.appendleft(view[count:])


def memory_link_pair(
    peer_a: str,
    peer_b: str,
    *,
    delay_s: float = 0.0,
    rate_bytes_per_s: float | None = None,
    capacity_bytes: int = limits.MEMORY_LINK_CAPACITY_BYTES,
) -> tuple[MemoryLink, MemoryLink]:
    """Return a link between two peers of this process: the end that ``peer_a`` holds, and ``peer_b``'s.

    Parameters
    ----------
    delay_s
        One way, in seconds.
    rate_bytes_per_s
        Of each direction; None for no limit.
    capacity_bytes
        What may be sent and not yet received, in each direction; senders wait beyond it.

    Raises
    ------
    UsageError
        If a figure is negative, or the capacity smaller than the largest header.
    """
    if delay_s < 0 or (rate_bytes_per_s is not None and rate_bytes_per_s <= 0):
        raise UsageError(f"delay_s is {delay_s} and rate_bytes_per_s {rate_bytes_per_s}; both must be positive")
    least_bytes = limits.LINK_HEADER_MAX_BYTES + _MESSAGE_OVERHEAD_BYTES
    if capacity_bytes < least_bytes:
        raise UsageError(f"capacity_bytes is {capacity_bytes}; it must be at least {least_bytes}")
    there, back = (_Pipe(delay_s, rate_bytes_per_s, capacity_bytes) for _ in range(2))
    link_a, link_b = MemoryLink(peer_b, back, there), MemoryLink(peer_a, there, back)
    link_a._ends = link_b._ends = (link_a, link_b)
    return link_a, link_b
