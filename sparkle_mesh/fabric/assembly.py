"""Puts a host together from py-libp2p's parts, and takes connections through its handshakes.

``libp2p.new_host`` also accepts plaintext, TLS and secio, by which a stranger can pass for anybody; here Noise
is the only security protocol and yamux the only multiplexer.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any

import trio
from libp2p.abc import INetConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import Transport as Noise
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from sparkle_mesh import limits
from sparkle_mesh.errors import UnreachableError
from sparkle_mesh.fabric.guards import (
    GuardedHost,
    GuardedSwarm,
    GuardedTasks,
    GuardedUpgrader,
    quiet_libp2p_logging,
    translated,
)
from sparkle_mesh.fabric.hubs import FabricCounters
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.tcp import SocketRegister, TcpConnection, dial_tcp, parse_tcp_address, tcp_address


def assemble_host(
    identity: Identity,
    counters: FabricCounters,
    tasks: GuardedTasks,
    on_connected: Callable[[INetConn], Awaitable[None]],
    on_disconnected: Callable[[INetConn], None],
) -> tuple[GuardedSwarm, GuardedHost]:
    """Return a swarm and its host with no listener and no connection yet."""
    quiet_libp2p_logging()
    key_pair = create_new_key_pair(identity.private_key_bytes())
    peer_id = ID.from_pubkey(key_pair.public_key)
    peerstore = PeerStore(max_peers=2 * limits.CONNECTIONS_MAX_COUNT)
    peerstore.add_key_pair(peer_id, key_pair)
    noise = Noise(key_pair, noise_privkey=create_new_noise_key_pair().private_key)
    swarm = GuardedSwarm(peer_id, peerstore, GuardedUpgrader(noise), tasks, on_connected, on_disconnected)
    return swarm, GuardedHost(swarm, counters)


async def open_tcp(
    address: Address, register: SocketRegister, source: tuple[str, int] | None = None
) -> trio.SocketStream:
    """Connect to ``address``, its name resolved if it has one; from ``source`` (see ``PortListener.source_for``).

    Raises
    ------
    UnreachableError, UsageError
        If it cannot be connected to, or is no TCP address.
    """
    kind, host, port = parse_tcp_address(address)
    hosts = [(host, port)] if kind.startswith("ip") else await _resolve(address)
    reason = "its name has no address"
    for ip, resolved_port in hosts:
        try:
            return await dial_tcp(ip, resolved_port, register, source)
        except OSError as error:
            reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        except trio.ClosedResourceError as error:
            raise UnreachableError("this process is closing its sockets") from error
    raise UnreachableError(reason)


async def _resolve(address: Address) -> list[tuple[str, int]]:
    # Loads a DNS client; most addresses have no name.
    from libp2p.utils.dns_utils import resolve_multiaddr_with_retry

    with translated("its name could not be resolved", UnreachableError):
        resolved = await resolve_multiaddr_with_retry(Multiaddr(address), max_retries=1)
    return [parse_tcp_address(str(found))[1:] for found in (resolved or [])[: limits.DNS_RESULTS_MAX_COUNT]]


async def upgrade_outbound(swarm: GuardedSwarm, stream: trio.SocketStream, peer_id: PeerId) -> INetConn:
    """Take a connection that was dialed through its handshakes; it stands when this returns.

    Raises
    ------
    UnreachableError
        If whoever answers is not ``peer_id``, or does not speak as libp2p with Noise and yamux.
    """
    upgraded = False
    try:
        connection = await upgrade_outbound_raw(swarm, RawConnection(TcpConnection(stream), True), peer_id)
        upgraded = True
        return connection
    finally:
        if not upgraded:
            await trio.aclose_forcefully(stream)


async def prove(swarm: GuardedSwarm, stream: trio.SocketStream, peer_id: PeerId) -> None:
    """Make sure that ``peer_id`` is at the other end, and no more. Raises anything."""
    raw = RawConnection(TcpConnection(stream), True)
    with trio.fail_after(limits.UPGRADE_TIMEOUT_S):
        await swarm.upgrader.upgrade_security(raw, True, ID.from_base58(peer_id))


async def upgrade_inbound(swarm: GuardedSwarm, connection: TcpConnection) -> None:
    """Take an accepted connection through its handshakes; it stands when this returns. Raises anything.

    py-libp2p's own handler of inbound connections holds a task and a place for each until the whole swarm ends.
    """
    await upgrade_inbound_raw(swarm, RawConnection(connection, False), tcp_address(*connection.remote))


async def upgrade_inbound_raw(swarm: GuardedSwarm, connection: RawConnection, address: Address) -> PeerId:
    """Take a connection from ``address`` through its handshakes as their server; return who it is. Raises anything."""
    muxed = await swarm.upgrade_inbound_raw_conn(connection, Multiaddr(address))
    return str(muxed.peer_id.to_base58())


async def upgrade_outbound_raw(swarm: GuardedSwarm, connection: RawConnection, peer_id: PeerId) -> INetConn:
    """Take a connection through its handshakes as their client; it stands when this returns.

    Raises
    ------
    UnreachableError
        As :func:`upgrade_outbound`.
    """
    with translated("the handshake failed", UnreachableError):
        return await swarm.upgrade_outbound_raw_conn(connection, ID.from_base58(peer_id))


def trio_descriptors() -> list[Callable[[], int]]:
    """Return functions that detach the descriptors of the current run's event loop, for a forked child.

    Private to trio: where its internals look otherwise, the child keeps copies of an idle poll set and of two
    ends of a wake-up pipe, which hold nothing of the network open.
    """
    detaches: list[Callable[[], int]] = []
    runner: Any = getattr(getattr(import_module("trio._core._run"), "GLOBAL_RUN_CONTEXT", None), "runner", None)
    io_manager = getattr(runner, "io_manager", None)
    for wakeup in (
        getattr(getattr(runner, "entry_queue", None), "wakeup", None),
        getattr(io_manager, "_force_wakeup", None),
    ):
        for name in ("wakeup_sock", "write_sock"):
            sock = getattr(wakeup, name, None)
            if sock is not None:
                detaches.append(sock.detach)
    epoll = getattr(io_manager, "_epoll", None)
    if epoll is not None:
        detaches.append(epoll.fileno)
    return detaches
