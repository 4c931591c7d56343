"""Addresses and peer ids as bytes, as libp2p's own protocols carry them."""

from __future__ import annotations

from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]
from multiaddr.exceptions import Error as MultiaddrError  # type: ignore[import-untyped]

from sparkle_mesh import limits
from sparkle_mesh.fabric.circuits import without_peer
from sparkle_mesh.fabric.interface import Address, PeerId


def address_to_bytes(address: Address) -> bytes:
    """Return ``address`` in its binary form."""
    return bytes(Multiaddr(address).to_bytes())


def address_of_bytes(data: bytes) -> Address | None:
    """Return the address in ``data``, which anybody may have sent, without the peer's tail; None if there is none."""
    if len(data) > limits.ADDRESS_MAX_CHARS:
        return None
    try:
        text = str(Multiaddr(data))
    except (MultiaddrError, ValueError, LookupError):
        return None
    return without_peer(text) if text.isprintable() else None


def is_tcp(address: Address) -> bool:
    """Whether ``address`` is that of a TCP port at an IP address, and nothing besides."""
    parts = address.split("/")
    return len(parts) == 5 and parts[1] in ("ip4", "ip6") and parts[3] == "tcp"


def peer_to_bytes(peer_id: PeerId) -> bytes:
    """Return ``peer_id`` in its binary form."""
    return bytes(ID.from_base58(peer_id).to_bytes())


def peer_of_bytes(data: bytes) -> PeerId:
    """Return the text of a peer id that anybody may have sent; whether it is one, the text does not say."""
    return str(ID(data[: limits.PEER_ID_MAX_CHARS // 2]).to_base58())
