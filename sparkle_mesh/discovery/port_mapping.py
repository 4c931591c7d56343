"""Asks the router to pass on connections to the port on which this process listens: NAT-PMP, else UPnP.

NAT-PMP after RFC 6886; UPnP's Internet Gateway Device by the library miniupnpc, which py-libp2p brings along.
"""

from __future__ import annotations

import ipaddress
import logging
import socket as stdlib_socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.errors import SparkleError, UnreachableError
from sparkle_mesh.fabric.interface import Address

logger = logging.getLogger(__name__)

_ROUTES = Path("/proc/net/route")
_OP_EXTERNAL_ADDRESS, _OP_MAP_TCP = 0, 2


class Mapping(NamedTuple):
    """What the router passes on: where others dial, for how long, and how it was asked."""

    host: str
    port: int
    lifetime_s: float
    how: str

    @property
    def address(self) -> Address:
        return f"/ip4/{self.host}/tcp/{self.port}"


def default_gateway(routes: Path = _ROUTES) -> str | None:
    """Return the IPv4 address of the router that packets to anywhere go to; None if the system does not tell."""
    try:
        lines = routes.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) > 3 and fields[1] == "00000000" and int(fields[3], 16) & 2:
            return stdlib_socket.inet_ntoa(struct.pack("<I", int(fields[2], 16)))
    return None


async def map_by_nat_pmp(gateway: str, port: int, *, lifetime_s: float = limits.PORT_MAPPING_S) -> Mapping:
    """Ask the router at ``gateway`` by NAT-PMP to pass TCP connections on to ``port``; 0 seconds end that.

    Raises
    ------
    UnreachableError
        If it does not answer so, or refuses.
    """
    with trio.socket.socket(stdlib_socket.AF_INET, stdlib_socket.SOCK_DGRAM) as sock:
        try:
            # Connected: what others send is not received.
            await sock.connect((gateway, limits.NAT_PMP_PORT))
            answer = await _ask(sock, struct.pack("!BB", 0, _OP_EXTERNAL_ADDRESS), "!BBHI4s")
            host = str(ipaddress.IPv4Address(answer[4]))
            request = struct.pack("!BBHHHI", 0, _OP_MAP_TCP, 0, port, port, int(lifetime_s))
            answer = await _ask(sock, request, "!BBHIHHI")
        except OSError as error:
            raise UnreachableError(f"router {gateway} does not speak NAT-PMP: {error.strerror or error}") from error
    return Mapping(host, answer[5], float(answer[6]), "NAT-PMP")


async def _ask(sock: trio.socket.SocketType, request: bytes, layout: str) -> tuple[Any, ...]:
    """Send ``request`` until there is an answer; each time it is waited for longer (RFC 6886, section 3.1)."""
    for attempt in range(limits.NAT_PMP_ATTEMPTS_COUNT):
        await sock.send(request)
        with trio.move_on_after(limits.NAT_PMP_WAIT_S * 2**attempt):
            while True:
                data = await sock.recv(limits.NAT_PMP_MESSAGE_MAX_BYTES)
                if len(data) == struct.calcsize(layout) and data[0] == 0 and data[1] == request[1] + 128:
                    answer = struct.unpack(layout, data)
                    if answer[2]:
                        raise UnreachableError(f"the router refuses to map a port: NAT-PMP result {answer[2]}")
                    return answer
    raise UnreachableError("the router does not answer to NAT-PMP")


def map_by_upnp(port: int, lifetime_s: float = limits.PORT_MAPPING_S) -> Mapping:
    """Ask the router by UPnP; blocks for a few seconds, for a thread.

    Raises
    ------
    UnreachableError
        If there is none that answers, or it refuses.
    """
    import miniupnpc

    client = miniupnpc.UPnP()
    client.discoverdelay = limits.UPNP_DISCOVERY_MS
    try:
        client.discover()
        client.selectigd()
        host = str(client.externalipaddress())
        client.addportmapping(port, "TCP", client.lanaddr, port, "Sparkle mesh", "", int(lifetime_s))
    # Of this very type, as miniupnpc raises it.
    except Exception as error:
        raise UnreachableError(f"no router maps ports by UPnP: {error}") from error
    return Mapping(host, port, lifetime_s, "UPnP")


async def _by_upnp(port: int) -> Mapping:
    return await trio.to_thread.run_sync(map_by_upnp, port, abandon_on_cancel=True)


class PortMapper:
    """Keeps one port mapped; ``by_upnp`` asks by UPnP."""

    def __init__(self, *, entropy: Entropy, by_upnp: Callable[[int], Awaitable[Mapping]] = _by_upnp) -> None:
        self._entropy, self._by_upnp = entropy, by_upnp
        self._mapping: Mapping | None = None
        self._status = "not tried yet"

    def status(self) -> str:
        """Say for people how that goes."""
        return self._status

    async def run(self, port: Callable[[], int | None], mapped: Callable[[Address | None], object]) -> None:
        """Keep the port that ``port`` returns mapped, and tell ``mapped`` where; until cancelled."""
        pause_s = limits.PORT_MAPPING_RETRY_S
        while True:
            number = port()
            if number is None:
                self._status = "not needed"
            mapping = await self._map(number) if number is not None else None
            if mapping != self._mapping:
                self._mapping = mapping
                mapped(mapping.address if mapping is not None else None)
            pause_s = mapping.lifetime_s / 2 if mapping is not None else limits.PORT_MAPPING_RETRY_S
            await trio.sleep(max(pause_s, limits.PORT_MAPPING_RENEW_MIN_S) * self._entropy.uniform(0.75, 1.0))

    async def _map(self, port: int) -> Mapping | None:
        reasons = []
        gateway = default_gateway()
        try:
            if gateway is not None:
                return self._done(await map_by_nat_pmp(gateway, port))
        except SparkleError as error:
            reasons.append(str(error))
        try:
            return self._done(await self._by_upnp(port))
        except SparkleError as error:
            reasons.append(str(error))
        self._status = "; ".join(reasons)[: limits.REASON_MAX_CHARS]
        return None

    def _done(self, mapping: Mapping) -> Mapping:
        self._status = f"{mapping.address} by {mapping.how}"
        if not ipaddress.ip_address(mapping.host).is_global:
            # One NAT behind another: what the nearer one passes on, the farther one does not.
            raise UnreachableError(f"the router itself is behind a NAT, at {mapping.host}")
        return mapping
