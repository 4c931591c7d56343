"""Reaches, and is reached by, peers through relays: the two ends of libp2p's circuit relay v2."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.errors import LinkClosedError, ProtocolError, SparkleError, UnreachableError
from sparkle_mesh.fabric.circuits import Circuit, circuit_address, is_circuit
from sparkle_mesh.fabric.interface import Address, Fabric, FabricStream, PeerId
from sparkle_mesh.fabric.multiaddrs import peer_of_bytes, peer_to_bytes
from sparkle_mesh.fabric.protobuf import receive_protobuf, send_protobuf
from sparkle_mesh.fabric.relay_service import HOP_PROTOCOL, STOP_PROTOCOL


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at a relay.

    Attributes
    ----------
    expires_at
        Until when, by trio's clock.
    address
        Where this process can be reached meanwhile.
    carries_bytes
        What a circuit carries; None for any amount.
    """

    relay_id: PeerId
    expires_at: float
    address: Address
    carries_bytes: int | None


class RelayedPipe(ReadWriteCloser):
    """A stream through a relay as libp2p wants a connection."""

    def __init__(self, stream: FabricStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await self._stream.read(limits.STREAM_READ_MAX_BYTES if n is None else n)
        except LinkClosedError as error:
            raise ConnectionClosedError(f"the circuit is closed: {error}", transport="circuit") from error

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.write(data)
        except LinkClosedError as error:
            raise ConnectionClosedError(f"the circuit is closed: {error}", transport="circuit") from error

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


class RelayClient:
    """This process at its relays.

    Parameters
    ----------
    upgrade_inbound
        Takes a connection that came through a relay through its handshakes, or raises.
    """

    def __init__(
        self,
        fabric: Fabric,
        upgrade_inbound: Callable[[RawConnection, Address], Awaitable[None]],
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._fabric, self._clock = fabric, clock
        self._upgrade_inbound = upgrade_inbound
        self._reservations: dict[PeerId, Reservation] = {}
        # Of peers whose circuits carry little, as their relays say.
        self._carries_bytes: dict[PeerId, int] = {}
        fabric.handle(STOP_PROTOCOL, self._serve_stop)

    async def reserve(self, relay_id: PeerId, *, timeout_s: float = limits.RELAY_ANSWER_TIMEOUT_S) -> Reservation:
        """Ask the connected peer ``relay_id`` for a place, or to keep the one that there is.

        Raises
        ------
        UnreachableError
            If it is no relay, or has no place.
        """
        remote_address = self._fabric.remote_address(relay_id)
        if remote_address is None or is_circuit(remote_address):
            raise UnreachableError(f"peer {relay_id} is not connected directly, so it cannot be this process's relay")
        stream = await self._fabric.open_stream(relay_id, HOP_PROTOCOL, timeout_s=timeout_s)
        try:
            await send_protobuf(stream, pb.HopMessage(type=pb.HopMessage.RESERVE))
            answer = await receive_protobuf(stream, pb.HopMessage, timeout_s=timeout_s)
            return self._reserved(relay_id, remote_address, answer)
        except (LinkClosedError, ProtocolError) as error:
            raise UnreachableError(f"relay {relay_id} gave no place: {error}") from error
        finally:
            stream.abort()

    def _reserved(self, relay_id: PeerId, remote_address: Address, answer: pb.HopMessage) -> Reservation:
        if answer.type != pb.HopMessage.STATUS or answer.status != pb.OK:
            raise UnreachableError(f"relay {relay_id} gave no place: status {answer.status}")
        # The relay's clock may be wrong: it is asked again in time whatever it says.
        told_s = answer.reservation.expire - self._clock.wall_time()
        lasts_s = min(max(told_s, limits.RELAY_RENEW_MIN_S), limits.RELAY_RESERVATION_S)
        address = circuit_address(relay_id, remote_address)
        reservation = Reservation(relay_id, trio.current_time() + lasts_s, address, _little(answer))
        self._reservations[relay_id] = reservation
        return reservation

    def forget(self, relay_id: PeerId) -> None:
        """Take no more circuits of ``relay_id``."""
        self._reservations.pop(relay_id, None)

    def carries_bytes(self, peer_id: PeerId) -> int | None:
        """Return how much a circuit to or from ``peer_id`` carries, the one agreed on last; None for any amount."""
        return self._carries_bytes.get(peer_id)

    def _note_limit(self, peer_id: PeerId, message: pb.HopMessage | pb.StopMessage) -> None:
        little = _little(message)
        if little is None:
            self._carries_bytes.pop(peer_id, None)
        elif len(self._carries_bytes) < limits.MESH_PEERS_MAX_COUNT:
            self._carries_bytes[peer_id] = little

    async def open_circuit(self, circuit: Circuit, peer_id: PeerId, address: Address) -> RawConnection:
        """Return a way to ``peer_id`` through a relay that is connected.

        Raises
        ------
        UnreachableError
            If the relay does not connect to it.
        """
        relay_id = circuit.relay_id
        stream = await self._fabric.open_stream(relay_id, HOP_PROTOCOL, timeout_s=limits.RELAY_ANSWER_TIMEOUT_S)
        connected = False
        try:
            question = pb.HopMessage(type=pb.HopMessage.CONNECT)
            question.peer.id = peer_to_bytes(peer_id)
            await send_protobuf(stream, question)
            answer = await receive_protobuf(stream, pb.HopMessage, timeout_s=limits.RELAY_ANSWER_TIMEOUT_S)
            if answer.type != pb.HopMessage.STATUS or answer.status != pb.OK:
                raise UnreachableError(f"relay {relay_id} does not connect to it: status {answer.status}")
            self._note_limit(peer_id, answer)
            connected = True
        except (LinkClosedError, ProtocolError) as error:
            raise UnreachableError(f"relay {relay_id} does not connect to it: {error}") from error
        finally:
            if not connected:
                stream.abort()
        return await self._connection(stream, address, initiator=True)

    async def _connection(self, stream: FabricStream, address: Address, *, initiator: bool) -> RawConnection:
        await stream.widen(limits.LINK_STREAM_WINDOW_BYTES)
        return RawConnection(RelayedPipe(stream), initiator, ConnectionType.RELAYED, [Multiaddr(address)])

    async def _serve_stop(self, stream: FabricStream) -> None:
        """Take a circuit that a relay offers."""
        reservation = self._reservations.get(stream.peer_id)
        message = await receive_protobuf(stream, pb.StopMessage)
        refusal = None
        if reservation is None or reservation.expires_at < trio.current_time():
            refusal = pb.PERMISSION_DENIED
        elif message.type != pb.StopMessage.CONNECT:
            refusal = pb.UNEXPECTED_MESSAGE
        status = pb.OK if refusal is None else refusal
        await send_protobuf(stream, pb.StopMessage(type=pb.StopMessage.STATUS, status=status))
        if reservation is None or refusal is not None:
            await stream.aclose()
            return
        self._note_limit(peer_of_bytes(message.peer.id), message)
        try:
            connection = await self._connection(stream, reservation.address, initiator=False)
            await self._upgrade_inbound(connection, reservation.address)
        except SparkleError:
            stream.abort()
            raise


def _little(message: pb.HopMessage | pb.StopMessage) -> int | None:
    """Return how much a circuit carries, if that is so little that it is of no other use than to agree on another way.

    Public relays mostly carry 128 KiB.
    """
    data = message.limit.data if message.HasField("limit") else 0
    return data if 0 < data < limits.RELAY_USEFUL_MIN_BYTES else None
