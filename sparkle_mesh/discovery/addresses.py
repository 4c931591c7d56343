"""Addresses as discovery sees them: which can be dialed, which are of this host only, what ``--join`` takes."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from sparkle_mesh import limits
from sparkle_mesh.errors import ProtocolError, UsageError
from sparkle_mesh.fabric.circuits import parse_circuit
from sparkle_mesh.fabric.identity import public_key_of_peer_id
from sparkle_mesh.fabric.interface import Address, PeerId

EXAMPLE = "/ip4/192.168.1.4/tcp/45654/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")
_PEER_ID_TEXT = re.compile(r"[A-Za-z0-9_.-]+")


class Endpoint(NamedTuple):
    """What a TCP multiaddr says: ``kind`` is ``ip4``, ``ip6``, ``dns``, ``dns4`` or ``dns6``."""

    kind: str
    host: str
    port: int


@lru_cache(maxsize=4096)
def parse_endpoint(address: Address) -> Endpoint | None:
    """Return where a ``/ip4/…/tcp/…`` (or ip6, dns) multiaddr leads; None if it is none that can be dialed."""
    parts = address.split("/")
    if len(parts) != 5 or parts[0] or parts[3] != "tcp" or len(address) > limits.ADDRESS_MAX_CHARS:
        return None
    _, kind, host, _, port_text = parts
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text[:6]) < 2**16):
        return None
    if kind in ("ip4", "ip6"):
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            return None
        if ip.version != int(kind[2]) or ip.is_unspecified or ip.is_multicast or "%" in host:
            return None
    elif kind not in ("dns", "dns4", "dns6") or not _HOST_NAME.fullmatch(host):
        return None
    return Endpoint(kind, host, int(port_text))


def is_dialable(address: Address) -> bool:
    """Whether ``address`` can be dialed, be it through a relay."""
    if len(address) > limits.ADDRESS_MAX_CHARS:
        return False
    circuit = parse_circuit(address)
    if circuit is not None:
        return is_peer_id_text(circuit.relay_id) and parse_endpoint(circuit.relay_address) is not None
    return parse_endpoint(address) is not None


def is_loopback(address: Address) -> bool:
    """Whether ``address`` leads back to the host that dials it."""
    endpoint = parse_endpoint(address)
    if endpoint is None:
        return False
    if not endpoint.kind.startswith("ip"):
        return endpoint.host.rstrip(".").lower() == "localhost"
    return ipaddress.ip_address(endpoint.host).is_loopback


def dialable(peer_id: PeerId, addresses: Iterable[Address]) -> tuple[Address, ...]:
    """Return those of ``addresses`` that can be dialed, once each, without a ``/p2p/<peer_id>`` tail, in order.

    At most ``limits.ADDRESSES_PER_PEER_MAX_COUNT`` of them.
    """
    tail = f"/p2p/{peer_id}"
    unique = dict.fromkeys(address.removesuffix(tail) for address in addresses)
    usable = [address for address in unique if is_dialable(address)]
    return tuple(usable[: limits.ADDRESSES_PER_PEER_MAX_COUNT])


def is_peer_id_text(text: str) -> bool:
    """Whether ``text`` may be a peer id: bounded, and free of anything that could mislead a log or an address."""
    return len(text) <= limits.PEER_ID_MAX_CHARS and _PEER_ID_TEXT.fullmatch(text) is not None


def parse_join_address(text: str) -> tuple[PeerId, Address]:
    """Split an address to join at into the peer id and the address without its ``/p2p/…`` tail.

    The peer id is needed because it is what the peer must prove at the dial: an address alone would trust
    whoever answers there.

    Raises
    ------
    UsageError
        If ``text`` is not of the form ``/ip4/192.168.1.4/tcp/45654/p2p/<peer id>`` (or ip6, dns, dns4, dns6).
    """
    if not text.strip().startswith("/"):
        # Not shown: it may be a mangled invite, which is a secret.
        raise UsageError(
            f"what was given to join at ({len(text)} characters) is neither an address nor an invite; expected e.g. "
            f"{EXAMPLE} (sparkle-node prints its own at start)"
        )
    shown = text if len(text) <= limits.ADDRESS_MAX_CHARS else text[: limits.ADDRESS_MAX_CHARS] + "…"
    address, separator, peer_id = text.strip().rpartition("/p2p/")
    if not separator:
        raise UsageError(
            f"join address {shown!r} lacks the peer id; expected e.g. {EXAMPLE} (sparkle-node prints its own at start)"
        )
    try:
        public_key_of_peer_id(peer_id)
    except ProtocolError as error:
        raise UsageError(f"join address {shown!r} ends in no peer id ({error}); expected e.g. {EXAMPLE}") from error
    if not is_dialable(address):
        raise UsageError(
            f"join address {shown!r} does not start with an address that can be dialed "
            f"(/ip4, /ip6 or /dns, then /tcp/PORT); expected e.g. {EXAMPLE}"
        )
    return peer_id, address
