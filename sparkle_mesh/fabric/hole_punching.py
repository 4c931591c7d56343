"""Direct connections through NATs: libp2p's DCUtR (libp2p specification, "Direct Connection Upgrade through Relay").

Over a connection through a relay both ends tell where their NATs have shown them to others, and then dial each other
at the same time, from the port on which they listen: each NAT takes what comes for an answer. Where both dials become
one connection, whoever had dialed through the relay is its client.

py-libp2p has a DCUtR of its own. It dials from a port that no NAT has shown to anybody, so that it works where no hole
needs to be punched.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.relay.circuit_v2.pb import dcutr_pb2 as pb

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, SparkleError
from sparkle_mesh.fabric.interface import Address, FabricStream, PeerId
from sparkle_mesh.fabric.multiaddrs import address_of_bytes, address_to_bytes, is_tcp
from sparkle_mesh.fabric.networks import ip_of
from sparkle_mesh.fabric.protobuf import receive_protobuf, send_protobuf

logger = logging.getLogger("sparkle_mesh.fabric")

PROTOCOL = "/libp2p/dcutr"


class HolePuncher:
    """Both sides of DCUtR.

    Parameters
    ----------
    seen_at
        Where others have seen this process's port.
    dial
        ``dial(peer_id, address, from_port, as_client)``: connects directly, from the port on which this process
        listens or any; whether it then acts as client or as server. Returns once the connection stands, or raises.
    """

    def __init__(
        self,
        *,
        seen_at: Callable[[], Sequence[Address]],
        dial: Callable[[PeerId, Address, bool, bool], Awaitable[None]],
    ) -> None:
        self._seen_at = seen_at
        self._dial = dial
        self._awaited: dict[PeerId, trio.Event] = {}
        #: Peers to which it was tried last to punch a hole: that they are connected does not show who can be dialed.
        self.tried: dict[PeerId, None] = {}
        #: Connections that were made so, and that were not, since the start.
        self.succeeded_count = self.failed_count = 0

    async def invite(self, stream: FabricStream) -> bool:
        """Ask the peer, which has come through a relay, for a direct connection; return whether one stands."""
        peer_id = stream.peer_id
        try:
            for _ in range(limits.HOLE_PUNCH_ATTEMPTS_COUNT):
                asked_at = trio.current_time()
                await send_protobuf(stream, self._connect_message())
                theirs = _addresses(await receive_protobuf(stream, pb.HolePunch), pb.HolePunch.CONNECT)
                round_trip_s = trio.current_time() - asked_at
                # One that no NAT hides can be dialed as anybody.
                reached = await self._try(peer_id, theirs, limits.HOLE_PUNCH_REVERSAL_S, from_port=False, client=True)
                if not reached:
                    await send_protobuf(stream, pb.HolePunch(type=pb.HolePunch.SYNC))
                    await trio.sleep(round_trip_s / 2)
                    reached = await self._try(peer_id, theirs, limits.HOLE_PUNCH_DIAL_S, from_port=True, client=False)
                if reached:
                    return self._ended(peer_id, True)
                if not theirs:
                    break
        except (LinkClosedError, ProtocolError) as error:
            logger.debug("no direct connection to %s: %s", peer_id, error)
        finally:
            stream.abort()
        return self._ended(peer_id, False)

    async def await_invitation(self, peer_id: PeerId) -> None:
        """Wait until ``peer_id``, which was dialed through a relay, has tried to make the connection direct."""
        # Several circuits may lead to it at a time: what is found out for one holds for all.
        event = self._awaited.setdefault(peer_id, trio.Event())
        try:
            with trio.move_on_after(limits.HOLE_PUNCH_TIMEOUT_S):
                await event.wait()
        finally:
            if self._awaited.get(peer_id) is event:
                del self._awaited[peer_id]

    async def serve(self, stream: FabricStream) -> None:
        """Answer a peer that was dialed through a relay and asks for a direct connection."""
        peer_id = stream.peer_id
        awaited = self._awaited.get(peer_id)
        try:
            for _ in range(limits.HOLE_PUNCH_ATTEMPTS_COUNT):
                theirs = _addresses(await receive_protobuf(stream, pb.HolePunch), pb.HolePunch.CONNECT)
                if awaited is None:
                    raise ProtocolError(f"peer {peer_id} wants a direct connection, but was not dialed through a relay")
                await send_protobuf(stream, self._connect_message())
                _addresses(await receive_protobuf(stream, pb.HolePunch), pb.HolePunch.SYNC)
                if await self._try(peer_id, theirs, limits.HOLE_PUNCH_DIAL_S, from_port=True, client=True):
                    self._ended(peer_id, True)
                    return
        except LinkClosedError as error:
            # The other side has a connection, or has given up.
            logger.debug("peer %s ended its tries: %s", peer_id, error)
        finally:
            if awaited is not None:
                awaited.set()
            stream.abort()

    def _ended(self, peer_id: PeerId, succeeded: bool) -> bool:
        if succeeded:
            self.succeeded_count += 1
            logger.info("peer %s is connected directly through its NAT", peer_id)
        else:
            self.failed_count += 1
        return succeeded

    def _connect_message(self) -> pb.HolePunch:
        seen_at = list(self._seen_at())[: limits.HOLE_PUNCH_ADDRESSES_MAX_COUNT]
        return pb.HolePunch(type=pb.HolePunch.CONNECT, ObsAddrs=map(address_to_bytes, seen_at))

    async def _try(
        self, peer_id: PeerId, addresses: Sequence[Address], timeout_s: float, *, from_port: bool, client: bool
    ) -> bool:
        """Dial all of ``addresses`` at once; return whether one led to ``peer_id``."""
        reached = False
        self.tried[peer_id] = None
        if len(self.tried) > limits.MESH_PEERS_MAX_COUNT:
            del self.tried[next(iter(self.tried))]

        async def dial(address: Address) -> None:
            nonlocal reached
            try:
                await self._dial(peer_id, address, from_port, client)
            except SparkleError as error:
                logger.debug("no hole to %s at %s: %s", peer_id, address, error)
            else:
                reached = True
                nursery.cancel_scope.cancel()

        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(dial, address)
        return reached


def _addresses(message: pb.HolePunch, expected: pb.HolePunch.Type.ValueType) -> list[Address]:
    """Return the addresses in ``message`` that may be dialed: a stranger names them, and has others send to them."""
    if message.type != expected:
        raise ProtocolError(f"a message of DCUtR has type {message.type} in place of {expected}")
    addresses: list[Address] = []
    for data in message.ObsAddrs[: limits.HOLE_PUNCH_ADDRESSES_MAX_COUNT]:
        address = address_of_bytes(data)
        ip = ip_of(address)
        if address is not None and ip is not None and ip.is_global and is_tcp(address):
            addresses.append(address)
    return addresses
