"""Questions to peers of the public DHT (``/ipfs/kad/1.0.0``): who is close to a key, who provides it.

After libp2p's specification "Kademlia DHT". This process asks and tells there, and serves nobody: what it holds of
others is in the mesh's own DHT.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from libp2p.kad_dht.pb import kademlia_pb2 as pb

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError, UnreachableError
from sparkle_mesh.fabric.interface import Address, Fabric, PeerId
from sparkle_mesh.fabric.multiaddrs import address_of_bytes, address_to_bytes, peer_of_bytes, peer_to_bytes
from sparkle_mesh.fabric.protobuf import receive_protobuf, send_protobuf
from sparkle_mesh.wire import PeerAddress

PROTOCOL = "/ipfs/kad/1.0.0"
# Multihash of SHA-256, as every key of provider records is one.
_SHA256_PREFIX = b"\x12\x20"


class KadAnswer(NamedTuple):
    """Who provides the key, and who is closer to it, as one peer says."""

    providers: list[PeerAddress]
    closer: list[PeerAddress]


def provider_key(digest: bytes) -> bytes:
    """Return the key of provider records that stands for a SHA-256 digest (32 bytes)."""
    return _SHA256_PREFIX + digest


class KadClient:
    """Asks one peer at a time; which, a lookup decides."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def place_of_key(self, key: bytes) -> bytes:
        """Return where ``key`` is in the DHT's space (32 bytes)."""
        return sha256(key).digest()

    def place_of_peer(self, peer_id: PeerId) -> bytes:
        """Return where a peer is in the DHT's space (32 bytes)."""
        return sha256(peer_to_bytes(peer_id)).digest()

    async def ask(self, peer_id: PeerId, key: bytes) -> KadAnswer:
        """Ask the connected ``peer_id`` who provides ``key``, and who is closer to it.

        Raises
        ------
        UnreachableError
            If it does not answer so that it can be understood.
        """
        message = pb.Message(type=pb.Message.GET_PROVIDERS, key=key)
        stream = await self._fabric.open_stream(peer_id, PROTOCOL, timeout_s=limits.PROTOBUF_ANSWER_TIMEOUT_S)
        try:
            await send_protobuf(stream, message)
            answer = await receive_protobuf(stream, pb.Message)
        except (LinkClosedError, ProtocolError) as error:
            raise UnreachableError(f"peer {peer_id} of the public DHT gave no answer: {error}") from error
        finally:
            stream.abort()
        return KadAnswer(_peers(answer.providerPeers), _peers(answer.closerPeers))

    async def tell(self, peer_id: PeerId, key: bytes, addresses: Sequence[Address]) -> None:
        """Tell the connected ``peer_id`` that this process provides ``key``, and is at ``addresses``.

        Raises
        ------
        UnreachableError
            If it cannot be told. Whether it remembers, it does not say.
        """
        message = pb.Message(type=pb.Message.ADD_PROVIDER, key=key)
        provider = message.providerPeers.add()
        provider.id = peer_to_bytes(self._fabric.peer_id)
        provider.addrs.extend(map(address_to_bytes, addresses))
        stream = await self._fabric.open_stream(peer_id, PROTOCOL, timeout_s=limits.PROTOBUF_ANSWER_TIMEOUT_S)
        try:
            await send_protobuf(stream, message)
        except LinkClosedError as error:
            raise UnreachableError(f"peer {peer_id} of the public DHT could not be told: {error}") from error
        finally:
            await stream.aclose()


def _peers(found: Sequence[pb.Message.Peer]) -> list[PeerAddress]:
    peers = []
    for peer in found[: limits.PUBLIC_DHT_NAMED_MAX_COUNT]:
        addresses = [address_of_bytes(data) for data in peer.addrs[: limits.PUBLIC_DHT_ADDRESSES_MAX_COUNT]]
        known = tuple(address for address in addresses if address is not None)
        peers.append(PeerAddress(peer_id=peer_of_bytes(peer.id), addresses=known))
    return peers
