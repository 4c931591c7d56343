"""Serves as a relay for peers that nobody can dial: libp2p's circuit relay v2, within the owner's limits.

:mod:`.relay_book` decides; this talks and carries. What is carried is encrypted between the two ends, the relay
included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK, Clock
from sparkle_mesh.errors import LinkClosedError, SparkleError
from sparkle_mesh.fabric.circuits import is_circuit
from sparkle_mesh.fabric.interface import Fabric, FabricStream, PeerId
from sparkle_mesh.fabric.multiaddrs import address_to_bytes, peer_of_bytes, peer_to_bytes
from sparkle_mesh.fabric.networks import network_of
from sparkle_mesh.fabric.protobuf import receive_protobuf, send_protobuf
from sparkle_mesh.fabric.relay_book import OpenCircuit, RelayBook, RelayLimits

logger = logging.getLogger("sparkle_mesh.fabric")

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/stop"


class RelayService:
    """Carries what others say to each other.

    Parameters
    ----------
    may_use
        Whether the owner lets a peer reserve a place here, and be connected through here.
    """

    def __init__(
        self,
        fabric: Fabric,
        bounds: RelayLimits,
        *,
        may_use: Callable[[PeerId], bool],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._fabric, self._clock = fabric, clock
        self._may_use = may_use
        self.book = RelayBook(bounds, trio.current_time())

    def start(self) -> None:
        """Serve from now on."""
        self._fabric.handle(HOP_PROTOCOL, self._serve)

    def status(self) -> str:
        """Say for people what is relayed."""
        book, bounds = self.book, self.book.bounds
        return (
            f"{book.reservation_count(trio.current_time())} of {bounds.reservations_max_count} peers can be reached "
            f"through here, {book.circuit_count} of {bounds.circuits_max_count} circuits are open, "
            f"{book.carried_bytes / 1e6:.1f} MB carried, at most {bounds.bytes_per_s / 1e6:g} MB/s"
        )

    async def _serve(self, stream: FabricStream) -> None:
        message = await receive_protobuf(stream, pb.HopMessage)
        if is_circuit(self._fabric.remote_address(stream.peer_id) or ""):
            # A place, or a circuit, through another relay.
            await self._refuse(stream, pb.PERMISSION_DENIED)
        elif message.type == pb.HopMessage.RESERVE:
            await self._reserve(stream)
        elif message.type == pb.HopMessage.CONNECT:
            await self._connect(stream, message)
        else:
            await self._refuse(stream, pb.UNEXPECTED_MESSAGE)

    async def _refuse(self, stream: FabricStream, status: pb.Status.ValueType) -> None:
        await send_protobuf(stream, pb.HopMessage(type=pb.HopMessage.STATUS, status=status))
        await stream.aclose()

    async def _reserve(self, stream: FabricStream) -> None:
        peer_id, now = stream.peer_id, trio.current_time()
        network = network_of(self._fabric.remote_address(peer_id))
        lasts_s = self.book.reserve(peer_id, network, now) if self._may_use(peer_id) else None
        if lasts_s is None:
            logger.info("peer %s gets no place at this relay", peer_id)
            await self._refuse(stream, pb.RESERVATION_REFUSED)
            return
        logger.info("peer %s can be reached through this relay", peer_id)
        tail = f"/p2p/{self._fabric.peer_id}"
        own = [address for address in self._fabric.addresses if not is_circuit(address)]
        reservation = pb.Reservation(
            # What the protocol wants here is the date on which it ends.
            expire=int(self._clock.wall_time() + lasts_s),
            addrs=[address_to_bytes(address + tail) for address in own[: limits.ADDRESSES_PER_PEER_MAX_COUNT]],
        )
        answer = pb.HopMessage(
            type=pb.HopMessage.STATUS, status=pb.OK, reservation=reservation, limit=self._limit_message()
        )
        await send_protobuf(stream, answer)
        await stream.aclose()

    def _limit_message(self) -> pb.Limit:
        bounds = self.book.bounds
        return pb.Limit(duration=int(bounds.circuit_max_s), data=bounds.circuit_max_bytes)

    async def _connect(self, stream: FabricStream, message: pb.HopMessage) -> None:
        source, target = stream.peer_id, peer_of_bytes(message.peer.id)
        now = trio.current_time()
        if not self.book.has_reservation(target, now) or target not in self._fabric.connected_peers():
            await self._refuse(stream, pb.NO_RESERVATION)
            return
        if not self._may_use(source):
            await self._refuse(stream, pb.PERMISSION_DENIED)
            return
        circuit = self.book.open_circuit(source, target, now)
        if circuit is None:
            await self._refuse(stream, pb.RESOURCE_LIMIT_EXCEEDED)
            return
        try:
            await self._join(stream, circuit)
        finally:
            self.book.close_circuit(circuit)

    async def _join(self, stream: FabricStream, circuit: OpenCircuit) -> None:
        """Connect the two ends of ``circuit`` and carry until one closes."""
        try:
            other = await self._ask_target(circuit)
        except SparkleError as error:
            logger.debug("peer %s takes no circuit from %s: %s", circuit.target, circuit.source, error)
            await self._refuse(stream, pb.CONNECTION_FAILED)
            return
        try:
            answer = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK, limit=self._limit_message())
            await send_protobuf(stream, answer)
            with trio.move_on_at(circuit.ends_at):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._carry, circuit, stream, other, nursery.cancel_scope)
                    nursery.start_soon(self._carry, circuit, other, stream, nursery.cancel_scope)
        finally:
            other.abort()
            stream.abort()

    async def _ask_target(self, circuit: OpenCircuit) -> FabricStream:
        timeout_s = limits.PROTOBUF_ANSWER_TIMEOUT_S
        other = await self._fabric.open_stream(circuit.target, STOP_PROTOCOL, timeout_s=timeout_s)
        accepted = False
        try:
            question = pb.StopMessage(type=pb.StopMessage.CONNECT, limit=self._limit_message())
            question.peer.id = peer_to_bytes(circuit.source)
            await send_protobuf(other, question)
            answer = await receive_protobuf(other, pb.StopMessage)
            if answer.type != pb.StopMessage.STATUS or answer.status != pb.OK:
                raise LinkClosedError(f"peer {circuit.target} answered with status {answer.status}")
            accepted = True
            return other
        finally:
            if not accepted:
                other.abort()

    async def _carry(
        self, circuit: OpenCircuit, source: FabricStream, target: FabricStream, done: trio.CancelScope
    ) -> None:
        """Carry one direction until its end, or what is allowed; then the circuit ends."""
        try:
            while True:
                data = await source.read(limits.STREAM_READ_MAX_BYTES)
                if not data or not circuit.take(source.peer_id, len(data)):
                    break
                await trio.sleep(self.book.throttle.wait_s(len(data), trio.current_time()))
                await target.write(data)
                self.book.carried_bytes += len(data)
        except LinkClosedError as error:
            logger.debug("a circuit from %s to %s ended: %s", circuit.source, circuit.target, error)
        done.cancel()
