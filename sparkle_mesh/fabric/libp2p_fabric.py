"""The control plane over py-libp2p: Noise and yamux over TCP, one port, GossipSub.

py-libp2p takes most of a second to import; that happens when a fabric is opened, not when this is imported.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import ClosedError, ProtocolError, UnreachableError, UsageError
from sparkle_mesh.fabric.circuits import is_circuit, named_peer, parse_circuit, without_peer
from sparkle_mesh.fabric.hubs import EventHub, FabricCounters, run_guarded
from sparkle_mesh.fabric.identity import Identity, check_peer_id
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
from sparkle_mesh.fabric.libp2p_streams import Libp2pStream
from sparkle_mesh.nurseries import bare_errors

if TYPE_CHECKING:
    from libp2p.abc import INetConn, INetStream

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


class Libp2pFabric:
    """A ``Fabric`` over libp2p. Made by :func:`open_libp2p_fabric`."""

    def __init__(self, identity: Identity, nursery: trio.Nursery) -> None:
        from sparkle_mesh.fabric import assembly, gossip, guards, libp2p_reach, tcp

        self._peer_id = identity.peer_id
        self.counters = FabricCounters()
        self._events = EventHub(self.counters)
        # What stands, in order of age.
        self._connections: dict[PeerId, list[INetConn]] = {}
        self._dialing: dict[PeerId, trio.Lock] = {}
        self._dial_limiter = trio.CapacityLimiter(limits.DIALS_AT_ONCE_MAX_COUNT)
        self._expanded: tuple[float, tuple[Address, ...]] | None = None
        self._sockets = tcp.SocketRegister()
        self._run_descriptors = assembly.trio_descriptors()
        self._port = tcp.PortListener(nursery, self.counters, self._sockets, self._upgrade)
        self._tasks = guards.GuardedTasks(nursery, self.counters)
        self._swarm, self._host = assembly.assemble_host(identity, self.counters, self._tasks, self._came, self._remove)
        self._gossip = gossip.Gossip(self._host, self.counters)
        #: What makes peers behind NATs reachable.
        self.reach = libp2p_reach.Libp2pReach(self, self._swarm, self._host, self._port, self._tasks)

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
        return tuple(dict.fromkeys((*self.reach.advertised(), *self._expanded[1])))

    def connected_peers(self) -> frozenset[PeerId]:
        return frozenset(self._connections)

    def remote_address(self, peer_id: PeerId) -> Address | None:
        connections = self._connections.get(peer_id)
        return _remote_address(connections[0]) if connections else None

    def is_direct(self, peer_id: PeerId) -> bool:
        """Whether a connection to ``peer_id`` stands that goes through no relay."""
        return any(not is_relayed(connection) for connection in self._connections.get(peer_id, ()))

    def events(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[FabricEvent]]:
        return self._events.subscribe(lambda: [_connected(peer, conns[0]) for peer, conns in self._connections.items()])

    async def _came(self, connection: INetConn) -> None:
        if is_relayed(connection):
            # Nobody is told of it before it has been tried to do without the relay.
            self.reach.came(connection)
        else:
            await self._add(connection)

    async def _add(self, connection: INetConn) -> None:
        peer_id: PeerId = connection.muxed_conn.peer_id.to_base58()
        connections = self._connections.setdefault(peer_id, [])
        connections.append(connection)
        if len(connections) == 1:
            self._events.emit(_connected(peer_id, connection))
        await self._swarm.announce(connection)

    def _remove(self, connection: INetConn) -> None:
        peer_id: PeerId = connection.muxed_conn.peer_id.to_base58()
        connections = self._connections.get(peer_id, [])
        if connection not in connections:
            return
        was_first = connections[0] is connection
        connections.remove(connection)
        if not connections:
            del self._connections[peer_id]
        if was_first:
            self.reach.from_port.discard(peer_id)
            # Streams go over the oldest: with it they are gone, though another connection may stand.
            self._events.emit(PeerDisconnected(peer_id))
        if was_first and connections:
            self._events.emit(_connected(peer_id, connections[0]))
            self._tasks.run_task(self._swarm.announce, connections[0])

    async def _upgrade(self, connection: TcpConnection) -> None:
        from sparkle_mesh.fabric import assembly

        await assembly.upgrade_inbound(self._swarm, connection)

    async def connect(
        self,
        peer_id: PeerId,
        addresses: Sequence[Address],
        *,
        timeout_s: float = limits.DIAL_TIMEOUT_S,
        from_port: bool = False,
    ) -> None:
        """As ``Fabric.connect``; addresses are tried in order, each a little after the one before.

        Parameters
        ----------
        from_port
            Whether to dial from the port on which this process listens, so that the peer sees what others could dial
            if a NAT lets them.
        """
        if peer_id == self._peer_id:
            raise UsageError(f"{peer_id} is this peer itself")
        reasons: dict[Address, str] = dict.fromkeys(addresses, "not tried yet")
        turn = self._dialing.setdefault(peer_id, trio.Lock())
        try:
            with trio.move_on_after(timeout_s):
                async with turn, self._dial_limiter:
                    if peer_id in self._connections or await self._dial_any(peer_id, reasons, from_port):
                        return
        finally:
            if not turn.locked():
                del self._dialing[peer_id]
        if peer_id in self._connections:
            return
        tried = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
        raise UnreachableError(f"peer {peer_id} could not be reached: {tried or 'no address is known'}")

    async def _dial_any(self, peer_id: PeerId, reasons: dict[Address, str], from_port: bool) -> bool:
        """Dial every address, the next one when the one before fails or takes long; True once one led there.

        One that is connected to is waited for longer: its handshakes take long only when both ends are busy, and
        would take longer if they were done twice.
        """
        reached = False

        async def dial(address: Address, connected: trio.Event, failed: trio.Event) -> None:
            nonlocal reached
            reasons[address] = "no answer in time"
            try:
                await self._dial(peer_id, address, connected, from_port)
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

    async def _dial(self, peer_id: PeerId, address: Address, connected: trio.Event, from_port: bool) -> None:
        from sparkle_mesh.fabric import assembly

        check_peer_id(peer_id)
        tail = named_peer(address)
        if tail and tail != peer_id:
            raise UnreachableError(f"it is the address of {tail}")
        circuit = parse_circuit(address)
        if circuit is not None:
            # It takes several round trips: the next address is not to be tried meanwhile for that alone.
            connected.set()
            await self.reach.dial_through(circuit, peer_id, without_peer(address))
            return
        source = self._port.source_for(address) if from_port else None
        stream = await assembly.open_tcp(address, self._sockets, source)
        connected.set()
        await assembly.upgrade_outbound(self._swarm, stream, peer_id)
        if source is not None and len(self._connections.get(peer_id, ())) == 1:
            self.reach.from_port.add(peer_id)

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

        return await self._host.new_stream_over(connection, [TProtocol(protocol)])

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


def is_relayed(connection: INetConn) -> bool:
    """Whether ``connection`` goes through a relay."""
    return is_circuit(_remote_address(connection) or "")


def _remote_address(connection: INetConn) -> Address | None:
    addresses = connection.get_transport_addresses()
    return without_peer(str(addresses[0])) if addresses else None


def _connected(peer_id: PeerId, connection: INetConn) -> PeerConnected:
    return PeerConnected(peer_id, _remote_address(connection), outbound=connection.muxed_conn.is_initiator)
