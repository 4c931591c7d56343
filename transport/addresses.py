"""Where to connect to for a direct link, and in what order."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from sparkle_mesh.clock import Entropy

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_HOST_ID_BYTES: Final = 16
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE: Final = Path("/proc/self/ns/net")
# Addresses that share so many leading bits are likely on one network.
_SAME_NETWORK_BITS: Final = {4: 16, 6: 64}


def host_id(mesh_id: bytes, entropy: Entropy, *, boot_id: Path = _BOOT_ID) -> bytes:
    """Return 16 bytes that processes with the same loopback interface share, and nobody else.

    It is keyed by the mesh id, so that a host cannot be recognised across meshes. Where the system does not tell,
    it is random: then no peer counts as being on the same host.
    """
    try:
        where = f"{boot_id.read_text(encoding='ascii').strip()} {_NETWORK_NAMESPACE.stat().st_ino}".encode()
    except OSError:
        return entropy.token(_HOST_ID_BYTES)
    return hmac.new(mesh_id, b"sparkle host " + where, hashlib.sha256).digest()[:_HOST_ID_BYTES]


def parse_address(address: str) -> tuple[IpAddress, int] | None:
    """Return IP address and port of ``/ip4/…/tcp/…`` or ``/ip6/…/tcp/…``; None for anything else.

    What leads through a relay is something else: the address in it is the relay's.
    """
    if "/p2p-circuit" in address:
        return None
    parts = address.partition("/p2p/")[0].split("/")
    # A zone (``fe80::1%eth0``) names an interface of the peer's, and could be any text.
    if len(parts) != 5 or parts[0] or parts[1] not in ("ip4", "ip6") or "%" in parts[2] or parts[3] != "tcp":
        return None
    if not (parts[4].isascii() and parts[4].isdigit() and 0 < int(parts[4]) < 65536):
        return None
    try:
        ip = ipaddress.ip_address(parts[2])
    except ValueError:
        return None
    return (ip, int(parts[4])) if f"ip{ip.version}" == parts[1] else None


def dial_order(
    addresses: Sequence[str], *, same_host: bool, proven: str | None, mine: Sequence[str]
) -> list[tuple[IpAddress, int]]:
    """Return the addresses that can be dialed, the most promising first.

    Parameters
    ----------
    addresses
        What the peer says it listens on.
    same_host
        Whether the peer shares this process's loopback interface.
    proven
        The address through which the control plane reaches the peer, if known.
    mine
        Addresses of this process.
    """
    own = [parsed[0] for parsed in map(parse_address, mine) if parsed]
    proven_ip = parsed[0] if proven is not None and (parsed := parse_address(proven)) else None

    def rank(ip: IpAddress) -> int:
        if ip.is_loopback:
            return 0 if same_host else 5
        if ip == proven_ip:
            return 1
        if ip.is_private and any(_on_one_network(ip, other) for other in own):
            return 2
        return 3 if ip.is_global else 4

    candidates = [parsed for parsed in map(parse_address, addresses) if parsed and not parsed[0].is_unspecified]
    return sorted(dict.fromkeys(candidates), key=lambda candidate: rank(candidate[0]))


def _on_one_network(one: IpAddress, other: IpAddress) -> bool:
    if one.version != other.version:
        return False
    return (int(one) ^ int(other)).bit_length() <= one.max_prefixlen - _SAME_NETWORK_BITS[one.version]
