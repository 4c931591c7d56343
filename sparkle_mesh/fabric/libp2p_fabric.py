"""The control plane over py-libp2p: Noise and yamux over TCP, one port, GossipSub.

py-libp2p takes most of a second to import; that happens when a fabric is opened, not when this is imported.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import ClosedError, LinkClosedError, ProtocolError, UnreachableError, UsageError
from sparkle_mesh.fabric.hubs import EventHub, FabricCounters, run_guarded
from sparkle_mesh.fabric.identity import Identity, public_key_of_peer_id
from sparkle_mesh.fabric.importing import import_libp2p
from sparkle_mesh.fabric.interface import (
    Accepts,
    Address,
    FabricEvent,
    PeerConnected,
    PeerDisconnected,
    PeerId,
    Published,
    RawHandler,
    StreamHandler,
)
from sparkle_mesh.nurseries import bare_errors

if TYPE_CHECKING:
    from libp2p.abc import INetConn, INetStream

    from sparkle_mesh.fabric.guards import GuardedTasks
    from sparkle_mesh.fabric.tcp import TcpConnection


@asynccontextmanager
async def open_libp2p_fabric(
    identity: Identity, *, listen: Sequence[Address] = ("/ip4/127.0.0.1/tcp/0",)
) -> AsyncIterator[Libp2pFabric]:
    """Run a fabric until the block ends; its connections are closed then.

    Parameters
    ----------
    identity
        Who this process is; peers authenticate it by its key.
    listen
        TCP addresses to listen on; port 0 takes a free one.

    Raises
    ------
    UsageError
        If an address cannot be listened on; the message says which and why.
    """
    import_libp2p()
    with bare_errors():
        async with trio.open_nursery() as nursery:
            fabric = Libp2pFabric(identity, nursery)
            try:
                for address in listen:
                    await fabric._port.listen(address)
                fabric._gossip.start(fabric._tasks)
                yield fabric
            finally:
                await fabric._close()
                nursery.cancel_scope.cancel()


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


class Libp2pFabric:
    """A ``Fabric`` over libp2p. Made by :func:`open_libp2p_fabric`."""

    def __init__(self, identity: Identity, nursery: trio.Nursery) -> None:
        from sparkle_mesh.fabric import assembly, gossip, guards, tcp

        self._peer_id = identity.peer_id
        self.counters = FabricCounters()
        self._events = EventHub(self.counters)
        # What stands, in order of age.
        self._connections: dict[PeerId, list[INetConn]] = {}
        self._dialing: dict[PeerId, trio.Lock] = {}
        self._dial_limiter = trio.CapacityLimiter(limits.DIALS_AT_ONCE_MAX_COUNT)
        self._closing = False
        self._expanded: tuple[float, tuple[Address, ...]] | None = None
        self._sockets = tcp.SocketRegister()
        self._run_descriptors = assembly.trio_descriptors()
        self._port = tcp.PortListener(nursery, self.counters, self._sockets, self._upgrade)
        self._tasks = guards.GuardedTasks(nursery, self.counters)
        self._swarm, self._host = assembly.assemble_host(identity, self.counters, self._tasks, self._add, self._remove)
        self._gossip = gossip.Gossip(self._host, self.counters)

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> tuple[Address, ...]:
        from sparkle_mesh.fabric.tcp import expand_wildcard

        now = trio.current_time()
        if self._expanded is None or now > self._expanded[0] + limits.INTERFACE_ADDRESSES_CACHE_S:
            expanded = (text for address in self._port.addresses() for text in expand_wildcard(address))
            self._expanded = now, tuple(dict.fromkeys(expanded))
        return self._expanded[1]

    def connected_peers(self) -> frozenset[PeerId]:
        return frozenset(self._connections)

    def remote_address(self, peer_id: PeerId) -> Address | None:
        connections = self._connections.get(peer_id)
        return _remote_address(connections[0]) if connections else None

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[FabricEvent]]:
        return self._events.subscribe(lambda: [_connected(peer, conns[0]) for peer, conns in self._connections.items()])

    def _add(self, connection: INetConn) -> None:
        peer_id: PeerId = connection.muxed_conn.peer_id.to_base58()
        connections = self._connections.setdefault(peer_id, [])
        connections.append(connection)
        if len(connections) == 1:
            self._events.emit(_connected(peer_id, connection))

    def _remove(self, connection: INetConn) -> None:
        peer_id: PeerId = connection.muxed_conn.peer_id.to_base58()
        connections = self._connections.get(peer_id, [])
        if connection in connections:
            connections.remove(connection)
            if not connections:
                del self._connections[peer_id]
                self._events.emit(PeerDisconnected(peer_id))

    async def _upgrade(self, connection: TcpConnection) -> None:
        from sparkle_mesh.fabric import assembly

        await assembly.upgrade_inbound(self._swarm, connection)

    async def connect(
        self, peer_id: PeerId, addresses: Sequence[Address], *, timeout_s: float = limits.DIAL_TIMEOUT_S
    ) -> None:
        """As ``Fabric.connect``; addresses are tried in order, each a little after the one before."""
        if peer_id == self._peer_id:
            raise UsageError(f"{peer_id} is this peer itself")
        reasons: dict[Address, str] = dict.fromkeys(addresses, "not tried yet")
        turn = self._dialing.setdefault(peer_id, trio.Lock())
        try:
            with trio.move_on_after(timeout_s):
                async with turn, self._dial_limiter:
                    if peer_id in self._connections or await self._dial_any(peer_id, reasons):
                        return
        finally:
            if not turn.locked():
                del self._dialing[peer_id]
        if peer_id in self._connections:
            return
        tried = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
        raise UnreachableError(f"peer {peer_id} could not be reached: {tried or 'no address is known'}")

    async def _dial_any(self, peer_id: PeerId, reasons: dict[Address, str]) -> bool:
        """Dial every address, the next one when the one before fails or takes long; True once one led there.

        One that is connected to is waited for longer: its handshakes take long only when both ends are busy, and
        would take longer if they were done twice.
        """
        reached = False

        async def dial(address: Address, connected: trio.Event, failed: trio.Event) -> None:
            nonlocal reached
            reasons[address] = "no answer in time"
            try:
                await self._dial(peer_id, address, connected)
            except (UnreachableError, ProtocolError, UsageError) as error:
                reasons[address] = str(error)
                connected.set()
                failed.set()
            else:
                reached = True
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for address in list(reasons):
                connected, failed = trio.Event(), trio.Event()
                nursery.start_soon(dial, address, connected, failed)
                with trio.move_on_after(limits.DIAL_STAGGER_S):
                    await connected.wait()
                if connected.is_set():
                    with trio.move_on_after(limits.DIAL_HANDSHAKE_PATIENCE_S):
                        await failed.wait()
        return reached

    async def _dial(self, peer_id: PeerId, address: Address, connected: trio.Event) -> None:
        from sparkle_mesh.fabric import assembly

        public_key_of_peer_id(peer_id)
        tail = address.partition("/p2p/")[2]
        if tail and tail != peer_id:
            raise UnreachableError(f"it is the address of {tail}")
        stream = await assembly.open_tcp(address, self._sockets)
        connected.set()
        await assembly.upgrade_outbound(self._swarm, stream, peer_id)

    async def disconnect(self, peer_id: PeerId) -> None:
        """As ``Fabric.disconnect``."""
        async with trio.open_nursery() as nursery:
            for connection in list(self._connections.get(peer_id, ())):
                nursery.start_soon(self._close_connection, connection)

    async def _close_connection(self, connection: INetConn) -> None:
        what = "closing a connection"
        await run_guarded(what, connection.close, trio.lowlevel.checkpoint, self.counters)

    async def open_stream(
        self, peer_id: PeerId, protocol: str, *, timeout_s: float = limits.OPEN_STREAM_TIMEOUT_S
    ) -> Libp2pStream:
        """As ``Fabric.open_stream``; a 257th stream at a time waits for a place until the deadline."""
        from sparkle_mesh.fabric.guards import translated

        connections = self._connections.get(peer_id)
        if not connections:
            raise UnreachableError(f"peer {peer_id} is not connected; connect to it first")
        what = f"a {protocol} stream to {peer_id} could not be opened"
        with trio.move_on_after(timeout_s):
            try:
                with translated(what, UnreachableError):
                    return Libp2pStream(await self._new_stream(connections[0], protocol), self._tasks)
            except (ClosedError, ProtocolError) as error:
                raise UnreachableError(f"{what}: {error}") from error
        raise UnreachableError(
            f"peer {peer_id} did not answer within {timeout_s:g} s when a {protocol} stream was opened"
        )

    async def _new_stream(self, connection: INetConn, protocol: str) -> INetStream:
        from libp2p.custom_types import TProtocol

        return await self._host.new_stream(connection.muxed_conn.peer_id, [TProtocol(protocol)])

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """As ``Fabric.handle``."""
        from libp2p.custom_types import TProtocol

        async def serve(net_stream: INetStream) -> None:
            stream = Libp2pStream(net_stream, self._tasks)
            what = f"the {protocol} handler for {stream.peer_id}"
            await run_guarded(what, partial(handler, stream), stream.reset, self.counters)

        self._host.set_stream_handler(TProtocol(protocol), serve)

    def handle_raw(self, magic: bytes, handler: RawHandler) -> None:
        """As ``Fabric.handle_raw``. Raises UsageError for a magic that is the start of another one."""
        self._port.handle_raw(magic, handler)

    async def publish(self, topic: str, data: bytes) -> None:
        """As ``Fabric.publish``. Raises UsageError over ``limits.GOSSIP_MESSAGE_MAX_BYTES``."""
        await self._gossip.publish(topic, data)

    def subscribe(
        self, topic: str, accepts: Accepts | None = None
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Published]]:
        """As ``Fabric.subscribe``."""
        return self._gossip.subscribe(topic, accepts)

    def close_in_child(self) -> None:
        """As ``Fabric.close_in_child``; the event loop's own descriptors go too."""
        from sparkle_mesh.fabric.tcp import close_descriptor

        self._sockets.close_in_child()
        for detach in self._run_descriptors:
            close_descriptor(detach())

    async def _close(self) -> None:
        with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            await self._port.close()
            # Together: closing one takes py-libp2p a fifth of a second.
            async with trio.open_nursery() as nursery:
                for peer_id in list(self._connections):
                    nursery.start_soon(self.disconnect, peer_id)
            await self._host.close()
        await self._tasks.stop()
        self._sockets.close_all()
        self._events.close()
        self._gossip.close()


def _remote_address(connection: INetConn) -> Address | None:
    addresses = connection.get_transport_addresses()
    return str(addresses[0]).partition("/p2p/")[0] if addresses else None


def _connected(peer_id: PeerId, connection: INetConn) -> PeerConnected:
    return PeerConnected(peer_id, _remote_address(connection), outbound=connection.muxed_conn.is_initiator)
