"""What a libp2p fabric does so that peers behind NATs reach it, and it them: relays, hole punching, tests of itself.

Which relays to use and when is decided above, by discovery; here is how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio
from libp2p.abc import INetConn
from libp2p.custom_types import TProtocol
from libp2p.network.connection.raw_connection import RawConnection

from sparkle_mesh import limits
from sparkle_mesh.errors import SparkleError, UnreachableError
from sparkle_mesh.fabric import assembly, hole_punching
from sparkle_mesh.fabric.circuits import Circuit
from sparkle_mesh.fabric.guards import GuardedHost, GuardedSwarm, GuardedTasks, translated
from sparkle_mesh.fabric.hole_punching import HolePuncher
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.kad_client import KadClient
from sparkle_mesh.fabric.libp2p_streams import Libp2pStream
from sparkle_mesh.fabric.observers import IDENTIFY_PROTOCOL, DialBackService, read_identity
from sparkle_mesh.fabric.relay_client import RelayClient
from sparkle_mesh.fabric.tcp import PortListener, TcpConnection

if TYPE_CHECKING:
    from sparkle_mesh.fabric.libp2p_fabric import Libp2pFabric


class Libp2pReach:
    """The ways to and from peers that cannot be dialed.

    Attributes
    ----------
    relays
        This process at its relays.
    puncher
        Makes connections through relays direct ones.
    kad
        Asks peers of the public DHT.
    seen_at
        Where others have seen this process's port.
    """

    def __init__(
        self,
        fabric: Libp2pFabric,
        swarm: GuardedSwarm,
        host: GuardedHost,
        port: PortListener,
        tasks: GuardedTasks,
    ) -> None:
        self._fabric, self._swarm, self._host, self._port, self._tasks = fabric, swarm, host, port, tasks
        #: Peers whose first connection was made from the port on which this process listens.
        self.from_port: set[PeerId] = set()
        self._advertised: dict[str, tuple[Address, ...]] = {}
        self._settling: dict[PeerId, trio.Event] = {}
        self.seen_at: Sequence[Address] = ()
        self.relays = RelayClient(fabric, self._upgrade_inbound)
        self.kad = KadClient(fabric)
        self.puncher = HolePuncher(seen_at=lambda: self.seen_at, dial=self._dial_hole)
        fabric.handle(hole_punching.PROTOCOL, self.puncher.serve)

    # --- Addresses ------------------------------------------------------------------------------

    def advertise(self, source: str, addresses: Sequence[Address]) -> bool:
        """Tell others of ``addresses`` beside those that are listened on; return whether that is news.

        They replace what was given for the same ``source`` before.
        """
        changed = self._advertised.get(source, ()) != tuple(addresses)
        self._advertised[source] = tuple(addresses)
        return changed

    def advertised(self) -> tuple[Address, ...]:
        """Return what is told beside the addresses that are listened on."""
        return tuple(address for addresses in self._advertised.values() for address in addresses)

    def is_from_port(self, peer_id: PeerId) -> bool:
        """Whether streams to ``peer_id`` go over a connection from the port on which this process listens."""
        return peer_id in self.from_port

    async def ask_where_seen(self, peer_id: PeerId, address: Address) -> Address | None:
        """Connect to ``peer_id`` once more, from the port on which this process listens; return where it is seen.

        The connection stays: for NATs it is what keeps the port's place.

        Raises
        ------
        UnreachableError
            If that cannot be done, or it does not tell.
        """
        source = self._port.source_for(address)
        with trio.move_on_after(limits.DIAL_TIMEOUT_S):
            stream = await assembly.open_tcp(address, self._port.register, source)
            connection = await assembly.upgrade_outbound(self._swarm, stream, peer_id)
            with translated(f"peer {peer_id} does not say who it is", UnreachableError):
                net_stream = await self._host.new_stream_over(connection, [TProtocol(IDENTIFY_PROTOCOL)])
            return (await read_identity(Libp2pStream(net_stream, self._tasks))).seen_at
        raise UnreachableError(f"peer {peer_id} did not answer within {limits.DIAL_TIMEOUT_S:g} s at {address}")

    def serve_dial_backs(self) -> None:
        """Dial those who want to know whether they can be dialed."""
        DialBackService(self._fabric, self._dial_back).start()

    async def _dial_back(self, peer_id: PeerId, address: Address) -> None:
        """Dial and prove ``peer_id`` at ``address``, and let go of it at once; the connection that stands is kept."""
        stream = await assembly.open_tcp(address, self._port.register)
        try:
            with translated("the handshake failed", UnreachableError):
                await assembly.prove(self._swarm, stream, peer_id)
        finally:
            await trio.aclose_forcefully(stream)

    # --- Relays ---------------------------------------------------------------------------------

    async def dial_through(self, circuit: Circuit, peer_id: PeerId, address: Address) -> None:
        """Connect to ``peer_id`` at ``address`` by ``circuit``, and then directly if that can be.

        Raises
        ------
        UnreachableError
            If the relay does not connect to it, or it is not who it should be.
        """
        if circuit.relay_id == self._fabric.peer_id:
            raise UnreachableError("it leads through this process itself")
        await self._fabric.connect(circuit.relay_id, [circuit.relay_address], from_port=True)
        connection = await self.relays.open_circuit(circuit, peer_id, address)
        await assembly.upgrade_outbound_raw(self._swarm, connection, peer_id)
        settled = self._settling.get(peer_id)
        if settled is not None:
            await settled.wait()
        if peer_id not in self._fabric.connected_peers():
            carries_bytes = self.relays.carries_bytes(peer_id)
            why = "" if carries_bytes is None else f", and the relay carries {carries_bytes} bytes only"
            raise UnreachableError(f"no direct connection came about{why}")

    async def _upgrade_inbound(self, connection: RawConnection, address: Address) -> None:
        with translated("the handshake through a relay failed", UnreachableError):
            await assembly.upgrade_inbound_raw(self._swarm, connection, address)

    def came(self, connection: INetConn) -> None:
        """A connection through a relay stands: nobody is told of it before it was tried to do without the relay."""
        peer_id: PeerId = connection.muxed_conn.peer_id.to_base58()
        settled = self._settling.setdefault(peer_id, trio.Event())
        self._tasks.run_task(self._settle, connection, peer_id, settled)

    async def _settle(self, connection: INetConn, peer_id: PeerId, settled: trio.Event) -> None:
        try:
            invited = connection.muxed_conn.is_initiator
            if invited:
                await self.puncher.await_invitation(peer_id)
            else:
                await self._invite(connection, peer_id)
            # One side alone decides that it is not needed, and not for another through a relay: where both have dialed
            # each other, each would close the one that the other is using.
            spare = not invited and self._fabric.is_direct(peer_id)
            if spare or self.relays.carries_bytes(peer_id) is not None:
                await connection.close()
            elif not connection.is_closed:
                await self._fabric._add(connection)
        finally:
            settled.set()
            if self._settling.get(peer_id) is settled:
                del self._settling[peer_id]

    async def _invite(self, connection: INetConn, peer_id: PeerId) -> None:
        with trio.move_on_after(limits.HOLE_PUNCH_TIMEOUT_S):
            try:
                with translated("no stream to agree on a direct connection", UnreachableError):
                    protocols = [TProtocol(hole_punching.PROTOCOL)]
                    stream = Libp2pStream(await self._host.new_stream_over(connection, protocols), self._tasks)
            except SparkleError:
                self.puncher.failed_count += 1
                return
            await self.puncher.invite(stream)

    async def _dial_hole(self, peer_id: PeerId, address: Address, from_port: bool, as_client: bool) -> None:
        source = self._port.source_for(address) if from_port else None
        stream = await assembly.open_tcp(address, self._port.register, source)
        if as_client:
            await assembly.upgrade_outbound(self._swarm, stream, peer_id)
            return
        upgraded = False
        try:
            with translated("the handshake failed", UnreachableError):
                raw = RawConnection(TcpConnection(stream), False)
                found = await assembly.upgrade_inbound_raw(self._swarm, raw, address)
            upgraded = True
            if found != peer_id:
                # It has proven who it is, and may be of use; it is not whom the hole was for.
                raise UnreachableError(f"{found} is there in its place")
        finally:
            if not upgraded:
                await trio.aclose_forcefully(stream)
