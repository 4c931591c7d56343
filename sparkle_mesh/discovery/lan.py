"""The runner of beacons: two UDP sockets, one that hears the group on every interface and one that sends to it.

IPv4 only: a network that carries IPv6 alone needs an address to join at. Where multicast is not permitted, one
line says so and the process goes on without.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil
import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.discovery.addresses import parse_endpoint
from sparkle_mesh.discovery.beacon import VERSION, Beacon, BeaconMachine, addresses_to_tell, encode_beacon
from sparkle_mesh.discovery.directory import Hint
from sparkle_mesh.fabric.interface import Address, PeerId

logger = logging.getLogger(__name__)


def interface_ips() -> tuple[str, ...]:
    """Return the IPv4 addresses of the interfaces that are up, one per interface, loopback first.

    At most ``limits.BEACON_INTERFACES_MAX_COUNT``.
    """
    stats = psutil.net_if_stats()
    ips: list[str] = []
    for name, addresses in psutil.net_if_addrs().items():
        if name in stats and stats[name].isup:
            ips.extend([a.address for a in addresses if a.family == socket.AF_INET][:1])
    ips.sort(key=lambda ip: not ipaddress.ip_address(ip).is_loopback)
    return tuple(ips[: limits.BEACON_INTERFACES_MAX_COUNT])


class LanBeacons:
    """Sends this process's beacons and reports those of others.

    Parameters
    ----------
    addresses
        Called for the addresses that this process listens on now.
    heard
        Called with each hint.
    group, port
        Where beacons go; all processes that are to find each other use the same.
    interfaces
        Called for the IPv4 addresses of the interfaces to use, now and then.
    """

    def __init__(
        self,
        me: PeerId,
        mesh_tag: bytes,
        *,
        addresses: Callable[[], Sequence[Address]],
        heard: Callable[[Hint], None],
        entropy: Entropy,
        group: str = limits.BEACON_GROUP,
        port: int = limits.BEACON_PORT,
        interfaces: Callable[[], Sequence[str]] = interface_ips,
    ) -> None:
        self._me = me
        self._mesh_tag = mesh_tag
        self._addresses = addresses
        self._heard = heard
        self._entropy = entropy
        self._group = group
        self._port = port
        self._interfaces = interfaces
        self._sockets: list[trio.socket.SocketType] = []
        self._wake = trio.Event()
        self._machine: BeaconMachine | None = None
        self._own_ips: frozenset[str] = frozenset()
        self._joined: set[str] = set()
        self._failed: dict[str, str] = {}
        self._problem: str | None = None
        self.sent_count = 0

    # --- Running --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send and hear beacons until cancelled; return at once where multicast is not permitted."""
        try:
            receiver = await self._open()
            task_status.started()
            if receiver is not None:
                machine = BeaconMachine(self._me, self._mesh_tag, entropy=self._entropy, now=trio.current_time())
                self._machine = machine
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_forever, machine)
                    await self._receive_all(receiver, machine)
                    nursery.cancel_scope.cancel()
        finally:
            for sock in self._sockets:
                sock.close()
            self._sockets.clear()

    def close_in_child(self) -> None:
        """In a forked child: close the inherited descriptors, sending nothing. Never raises."""
        for sock in self._sockets:
            with suppress(OSError):
                os.close(sock.detach())
        self._sockets.clear()

    def status(self) -> str:
        """Say in one line how it goes."""
        if self._problem is not None:
            return f"not possible ({self._problem})"
        if self._machine is None:
            return "not started"
        machine = self._machine
        parts = [
            f"multicast on {len(self._joined)} interfaces",
            f"{machine.heard_count} beacons heard",
            f"{self.sent_count} sent",
        ]
        if machine.dropped_count:
            parts.append(f"{machine.dropped_count} dropped (too many at once)")
        return ", ".join(parts) + "".join(f"; {ip}: {reason}" for ip, reason in self._failed.items())

    async def _open(self) -> trio.socket.SocketType | None:
        try:
            receiver = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sockets.append(receiver)
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                # BSDs hand multicast to all who share a port only with this one.
                receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Bound to the group the socket hears nothing that was sent to this host alone; Windows cannot.
            await receiver.bind(("" if sys.platform == "win32" else self._group, self._port))
            sender = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sockets.append(sender)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, limits.BEACON_HOPS_MAX_COUNT)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return None
        self._follow_interfaces(receiver)
        if not self._joined:
            self._give_up("; ".join(f"{ip}: {reason}" for ip, reason in self._failed.items()) or "no interface is up")
            return None
        return receiver

    async def _send_forever(self, machine: BeaconMachine) -> None:
        receiver, sender = self._sockets
        while True:
            self._wake = trio.Event()
            with trio.move_on_at(machine.next_wakeup()):
                await self._wake.wait()
            asks = machine.due(trio.current_time())
            if asks is not None:
                self._follow_interfaces(receiver)
                await self._send(sender, wants_answer=asks)

    async def _receive_all(self, receiver: trio.socket.SocketType, machine: BeaconMachine) -> None:
        while True:
            try:
                # One byte more than is allowed, so that what is too long shows.
                datagram, sender = await receiver.recvfrom(limits.BEACON_MAX_BYTES + 1)
            except OSError as error:
                self._give_up(error.strerror or str(error))
                return
            sender_ip = sender[0]
            same_host = sender_ip in self._own_ips
            planned_at = machine.next_wakeup()
            hint = machine.received(datagram, sender_ip, trio.current_time(), same_host=same_host)
            if hint is not None:
                self._heard(hint)
            if machine.next_wakeup() < planned_at:
                self._wake.set()

    # --- Interfaces -----------------------------------------------------------------------------

    def _follow_interfaces(self, receiver: trio.socket.SocketType) -> None:
        """Hear the group on interfaces that came, forget those that went."""
        try:
            self._own_ips = frozenset(self._interfaces())
        except OSError as error:
            self._note_failure("interfaces", error)
            return
        for ip in self._joined - self._own_ips:
            # The kernel left the group there when the address went; where it did not, leaving now is harmless.
            with suppress(OSError):
                receiver.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, self._membership(ip))
        self._joined &= self._own_ips
        self._failed = {ip: reason for ip, reason in self._failed.items() if ip in self._own_ips}
        for ip in self._own_ips - self._joined:
            try:
                receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, self._membership(ip))
            except OSError as error:
                self._note_failure(ip, error)
            else:
                self._joined.add(ip)

    def _membership(self, ip: str) -> bytes:
        return socket.inet_aton(self._group) + socket.inet_aton(ip)

    async def _send(self, sender: trio.socket.SocketType, *, wants_answer: bool) -> None:
        addresses = self._addresses()
        for ip in sorted(self._joined):
            told = addresses_to_tell(addresses, ip)
            if not told:
                continue
            endpoint = parse_endpoint(told[0])
            beacon = Beacon(
                version=VERSION,
                mesh_tag=self._mesh_tag,
                peer_id=self._me,
                addresses=told,
                port=endpoint.port if endpoint is not None else 0,
                wants_answer=wants_answer,
            )
            try:
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(ip))
                await sender.sendto(encode_beacon(beacon), (self._group, self._port))
            except OSError as error:
                self._note_failure(ip, error)
            else:
                self.sent_count += 1
                self._failed.pop(ip, None)

    def _note_failure(self, ip: str, error: OSError) -> None:
        reason = error.strerror or str(error)
        if ip not in self._failed:
            logger.info("multicast on %s: %s", ip, reason)
        self._failed[ip] = reason

    def _give_up(self, reason: str) -> None:
        self._problem = reason
        logger.warning(
            "peers on the local network cannot be found by multicast (group %s, UDP port %d): %s; "
            "give the address of one to join at instead",
            self._group,
            self._port,
            reason,
        )
