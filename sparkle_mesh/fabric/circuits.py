"""Addresses of peers behind a relay: ``/ip4/203.0.113.5/tcp/45654/p2p/<relay>/p2p-circuit``.

As everywhere, they are without the ``/p2p/…`` tail that names the peer itself.
"""

from __future__ import annotations

from typing import NamedTuple

from sparkle_mesh.fabric.interface import Address, PeerId

_END = "/p2p-circuit"


class Circuit(NamedTuple):
    """The relay to go through, and where it listens."""

    relay_id: PeerId
    relay_address: Address


def circuit_address(relay_id: PeerId, relay_address: Address) -> Address:
    """Return the address of whoever has a reservation at the relay."""
    return f"{relay_address}/p2p/{relay_id}{_END}"


def is_circuit(address: Address) -> bool:
    """Whether ``address`` leads through a relay."""
    return _END in address


def parse_circuit(address: Address) -> Circuit | None:
    """Return what relay ``address`` leads through; None if it is no such address, or leads through several."""
    through, separator, tail = address.partition(_END)
    if not separator or _END in tail or (tail and not tail.startswith("/p2p/")):
        return None
    relay_address, separator, relay_id = through.rpartition("/p2p/")
    if not separator or not relay_id or "/" in relay_id or "/p2p/" in relay_address:
        return None
    return Circuit(relay_id, relay_address)


def without_peer(address: Address) -> Address:
    """Return ``address`` without the ``/p2p/…`` tail that names the peer itself."""
    through, separator, _ = address.partition(_END)
    return through + separator if separator else address.partition("/p2p/")[0]


def named_peer(address: Address) -> PeerId | None:
    """Return the peer that ``address`` names at its end; None if it names none."""
    end = address.rpartition(_END)[2] if _END in address else address
    return end.partition("/p2p/")[2] or None
