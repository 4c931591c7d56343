"""Streams over py-libp2p as the fabric's interface wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError
from sparkle_mesh.fabric.hubs import FabricCounters, run_guarded
from sparkle_mesh.fabric.interface import PeerId

if TYPE_CHECKING:
    from libp2p.abc import INetStream

    from sparkle_mesh.fabric.guards import GuardedTasks


class Libp2pStream:
    """A stream over libp2p; satisfies ``FabricStream``."""

    def __init__(self, net_stream: INetStream, tasks: GuardedTasks) -> None:
        self._net_stream = net_stream
        self._tasks = tasks
        self._muxed: Any = net_stream.muxed_stream  # type: ignore[attr-defined]
        self._peer_id: PeerId = net_stream.muxed_conn.peer_id.to_base58()
        self._closed = False
        self._writing = trio.Lock()

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    async def read(self, max_bytes: int) -> bytes:
        """As ``FabricStream.read``."""
        from sparkle_mesh.fabric.guards import translated

        if self._closed:
            raise self._error("was closed here")
        try:
            with translated(f"the stream to {self._peer_id} failed"):
                return bytes(await self._net_stream.read(max_bytes))
        except LinkClosedError as error:
            return self._read_after_end(max_bytes, error)

    def _read_after_end(self, max_bytes: int, error: LinkClosedError) -> bytes:
        """Return what had arrived when the connection ended, or nothing at an orderly end; else raise ``error``."""
        from libp2p.network.stream.exceptions import StreamEOF

        if self._closed:
            raise self._error("was closed here") from error
        unread: bytes = getattr(self._muxed, "unread_at_end", b"")
        if unread:
            self._muxed.unread_at_end = unread[max_bytes:]
            return unread[:max_bytes]
        cut_off = self._muxed.conn.event_shutting_down.is_set() or self._muxed.reset_received
        at_end = isinstance(error.__cause__, StreamEOF) and not cut_off
        if at_end or getattr(self._muxed, "ended_by_peer", False):
            return b""
        raise error

    async def write(self, data: bytes | memoryview) -> None:
        """As ``FabricStream.write``; waits while the peer's window is full."""
        from sparkle_mesh.fabric.guards import translated

        async with self._writing:
            rest = memoryview(data)
            while rest:
                await self._wait_for_window()
                window = self._muxed.send_window
                with translated(f"the stream to {self._peer_id} failed"):
                    await self._net_stream.write(bytes(rest[:window]))
                rest = rest[window:]

    async def _wait_for_window(self) -> None:
        # Yamux waits for its window too, and gives the stream up after five seconds.
        while True:
            if self._closed:
                raise self._error("was closed here")
            if self._muxed.recv_closed or self._muxed.closed:
                raise self._error("was closed by the peer")
            if self._muxed.send_window > 0:
                return
            await self._muxed.changed.park()

    async def widen(self, window_bytes: int) -> None:
        """As ``FabricStream.widen``."""
        from sparkle_mesh.fabric.guards import translated

        with translated(f"the stream to {self._peer_id} failed"):
            await self._muxed.widen(window_bytes)

    def _error(self, what: str) -> LinkClosedError:
        return LinkClosedError(f"the stream to {self._peer_id} {what}")

    async def aclose(self) -> None:
        """As ``FabricStream.aclose``."""
        if not self._closed:
            self._close_here()
            await self._end(self._net_stream.close)

    async def reset(self) -> None:
        """As ``FabricStream.reset``."""
        self._close_here()
        await self._end(self._net_stream.reset)

    def abort(self) -> None:
        """As ``FabricStream.abort``."""
        if not self._closed:
            self._close_here()
            self._tasks.run_task(self._end, self._net_stream.reset)

    def _close_here(self) -> None:
        """Wake who waits, and drop what nobody will read: yamux would keep it for a minute."""
        self._closed = True
        self._muxed.recv_closed = True
        connection, stream_id = self._muxed.conn, self._muxed.stream_id
        connection.stream_buffers.get(stream_id, bytearray()).clear()
        event = connection.stream_events.get(stream_id)
        if event is not None:
            event.set()

    async def _end(self, end: Any) -> None:
        with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            # A stream whose connection is gone cannot be closed, and need not be.
            await run_guarded(f"closing a stream to {self._peer_id}", end, trio.lowlevel.checkpoint, FabricCounters())
