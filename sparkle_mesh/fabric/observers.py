"""What others see of this process: where it comes from (identify), and whether it can be dialed (AutoNAT v1).

Both are libp2p's own protocols, so that any public peer answers (libp2p specification, "Identify" and "AutoNAT v1").
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import trio
from libp2p.host.autonat.pb import autonat_pb2 as pb
from libp2p.identity.identify.pb.identify_pb2 import Identify

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, SparkleError, UnreachableError
from sparkle_mesh.fabric.interface import Address, Fabric, FabricStream, PeerId
from sparkle_mesh.fabric.multiaddrs import address_of_bytes, address_to_bytes, is_tcp, peer_to_bytes
from sparkle_mesh.fabric.networks import ip_of
from sparkle_mesh.fabric.protobuf import receive_protobuf, send_protobuf

logger = logging.getLogger("sparkle_mesh.fabric")

IDENTIFY_PROTOCOL = "/ipfs/id/1.0.0"
AUTONAT_PROTOCOL = "/libp2p/autonat/1.0.0"

#: Whether a peer could dial this process; ``"unknown"`` if it did not say.
DialedBack: TypeAlias = Literal["yes", "no", "unknown"]


@dataclass(frozen=True, slots=True)
class PeerReport:
    """What a peer says: where this process is connected to it from, and which protocols it speaks."""

    seen_at: Address | None
    protocols: frozenset[str]


async def ask_identity(fabric: Fabric, peer_id: PeerId) -> PeerReport:
    """Ask the connected ``peer_id`` who it is, and where it sees this process.

    Raises
    ------
    UnreachableError
        If it does not answer so that it can be understood.
    """
    stream = await fabric.open_stream(peer_id, IDENTIFY_PROTOCOL, timeout_s=limits.PROTOBUF_ANSWER_TIMEOUT_S)
    return await read_identity(stream)


async def read_identity(stream: FabricStream) -> PeerReport:
    """Read what the peer says on a stream of identify, and end the stream; raises as :func:`ask_identity`."""
    try:
        report = await receive_protobuf(stream, Identify)
    except (LinkClosedError, ProtocolError) as error:
        raise UnreachableError(f"peer {stream.peer_id} does not say who it is: {error}") from error
    finally:
        stream.abort()
    protocols = frozenset(report.protocols[: limits.IDENTIFY_PROTOCOLS_MAX_COUNT])
    return PeerReport(_address(report.observed_addr), protocols)


async def ask_to_dial_back(fabric: Fabric, peer_id: PeerId, addresses: Sequence[Address]) -> DialedBack:
    """Ask the connected ``peer_id`` to dial this process at ``addresses``, and return whether it could."""
    timeout_s = limits.DIAL_BACK_TIMEOUT_S
    question = pb.Message(type=pb.Message.DIAL)
    question.dial.peer.id = peer_to_bytes(fabric.peer_id)
    question.dial.peer.addrs.extend(map(address_to_bytes, addresses))
    try:
        stream = await fabric.open_stream(peer_id, AUTONAT_PROTOCOL, timeout_s=timeout_s)
        try:
            await send_protobuf(stream, question)
            answer = await receive_protobuf(stream, pb.Message, timeout_s=timeout_s)
        finally:
            stream.abort()
    except SparkleError as error:
        logger.debug("peer %s does not say whether it can dial this process: %s", peer_id, error)
        return "unknown"
    status = answer.dialResponse.status
    if status == pb.Message.OK:
        return "yes"
    return "no" if status == pb.Message.E_DIAL_ERROR else "unknown"


class DialBackService:
    """Dials those who ask for it, at the address that they come from and at no other.

    Parameters
    ----------
    dial
        Makes a connection to a peer at an address, and closes it again; raises if there is none.
    """

    def __init__(self, fabric: Fabric, dial: Callable[[PeerId, Address], Awaitable[None]]) -> None:
        self._fabric = fabric
        self._dial = dial
        self._limiter = trio.CapacityLimiter(limits.DIAL_BACKS_AT_ONCE_MAX_COUNT)
        self._asked_at: dict[PeerId, float] = {}

    def start(self) -> None:
        """Serve from now on."""
        self._fabric.handle(AUTONAT_PROTOCOL, self._serve)

    async def _serve(self, stream: FabricStream) -> None:
        question = await receive_protobuf(stream, pb.Message)
        if question.type != pb.Message.DIAL:
            raise ProtocolError(f"peer {stream.peer_id} asked for a dial with a message of type {question.type}")
        answer = pb.Message(type=pb.Message.DIAL_RESPONSE)
        answer.dialResponse.status = await self._answer(stream.peer_id, question)
        await send_protobuf(stream, answer)
        await stream.aclose()

    async def _answer(self, peer_id: PeerId, question: pb.Message) -> pb.Message.ResponseStatus.ValueType:
        now = trio.current_time()
        seen = ip_of(self._fabric.remote_address(peer_id))
        addresses = []
        for data in question.dial.peer.addrs[: limits.ADDRESSES_PER_PEER_MAX_COUNT]:
            address = _address(data)
            if address is not None and seen is not None and ip_of(address) == seen:
                addresses.append(address)
        recently = now - self._asked_at.get(peer_id, float("-inf")) < limits.DIAL_BACK_INTERVAL_S
        if not addresses or recently or self._limiter.available_tokens < 1:
            return pb.Message.E_DIAL_REFUSED
        self._asked_at = {peer: at for peer, at in self._asked_at.items() if now - at < limits.DIAL_BACK_INTERVAL_S}
        self._asked_at[peer_id] = now
        async with self._limiter:
            for address in addresses[: limits.DIAL_BACK_ADDRESSES_MAX_COUNT]:
                try:
                    with trio.move_on_after(limits.UPGRADE_TIMEOUT_S):
                        await self._dial(peer_id, address)
                        return pb.Message.OK
                except SparkleError as error:
                    logger.debug("peer %s cannot be dialed at %s: %s", peer_id, address, error)
        return pb.Message.E_DIAL_ERROR


def _address(data: bytes) -> Address | None:
    """Return the TCP address in ``data``; None if it is another, or none."""
    address = address_of_bytes(data)
    return address if address is not None and is_tcp(address) else None
