"""Where an address is: on this host or its local networks, or in which public network."""

from __future__ import annotations

import ipaddress
from itertools import pairwise
from typing import TypeAlias

from sparkle_mesh import limits
from sparkle_mesh.fabric.circuits import is_circuit
from sparkle_mesh.fabric.interface import Address

Ip: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def ip_of(address: Address | None) -> Ip | None:
    """Return the IP address in a multiaddr; None if there is none."""
    if address is None:
        return None
    for protocol, value in pairwise(address.split("/")[1:]):
        if protocol in ("ip4", "ip6"):
            try:
                return ipaddress.ip_address(value.split("%")[0])
            except ValueError:
                return None
    return None


def is_local_address(address: Address | None) -> bool:
    """Whether a multiaddr is on this host, a private network, or link-local."""
    if address is None or is_circuit(address):
        # Where a peer behind a relay is, nobody can tell.
        return False
    ip = ip_of(address)
    if ip is None:
        return address.startswith("/memory/")
    return ip.is_private or ip.is_loopback or ip.is_link_local


def network_of(address: Address | None) -> str | None:
    """Return the network that ``address`` is in, for limits by subnet; None where none apply.

    What comes through a relay counts as being where the relay is. Those of this host and of private networks are not
    limited: whoever is there is there by permission.
    """
    ip = ip_of(address)
    if ip is None or not ip.is_global:
        return None
    prefix = limits.NETWORK_IPV4_PREFIX_BITS if ip.version == 4 else limits.NETWORK_IPV6_PREFIX_BITS
    return str(ipaddress.ip_network((ip, prefix), strict=False))


def source_of(address: Address | None) -> str | None:
    """Return what stands for whoever connects from ``address``, for limits by address; None if it has no IP address.

    It is the address without its port. Of a public IPv6 address it is the network: one host may have all of it.
    """
    ip = ip_of(address)
    if ip is None:
        return None
    return (network_of(address) if ip.version == 6 else None) or str(ip)
