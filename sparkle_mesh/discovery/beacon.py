"""Beacons: what a process shouts into the local network, and when; pure.

A beacon is one UDP datagram to a multicast group: :data:`MAGIC`, then a :class:`Beacon` as MessagePack. A
newcomer sends a few in quick succession that ask for an answer; whoever hears the first of them and is of the
same mesh answers once, after a random delay, to the group, so that one answer serves every newcomer of that
moment. Afterwards each process sends one now and then.

Why not mDNS: py-libp2p's stalls the trio loop for 1.6 s at its start and runs threads; the library beneath it
is written for asyncio. DNS-SD would also put readable names of meshes on the network; a beacon carries an
opaque tag. Beacons are hints and nothing more: who a peer is, it proves when it is dialed.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import Entropy
from sparkle_mesh.discovery.addresses import is_loopback, parse_endpoint
from sparkle_mesh.discovery.directory import LAN, Hint
from sparkle_mesh.errors import ProtocolError, VersionError
from sparkle_mesh.fabric.interface import Address, PeerId

MAGIC = b"spkl"
VERSION = 1


class Beacon(wire.Message, frozen=True):
    """One process of one mesh.

    Attributes
    ----------
    mesh_tag
        The mesh; says nothing to those who do not know its name (and key, if it has one).
    addresses
        Where it listens, without the ``/p2p/…`` tail.
    port
        The TCP port it listens on, for hosts that see it at another address than it knows of.
    wants_answer
        Whether it has just started and asks the others to tell of themselves.
    """

    version: wire.Count
    mesh_tag: wire.Bytes32
    peer_id: wire.PeerIdText
    addresses: wire.AddressList
    port: Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
    wants_answer: bool = False


class _Versioned(wire.Message, frozen=True):
    version: wire.Count


def encode_beacon(beacon: Beacon) -> bytes:
    """Return the datagram; addresses at the end of the list are left out if it would be too large."""
    while True:
        datagram = MAGIC + wire.encode(beacon)
        if len(datagram) <= limits.BEACON_MAX_BYTES or not beacon.addresses:
            return datagram
        beacon = msgspec.structs.replace(beacon, addresses=beacon.addresses[:-1])


def decode_beacon(datagram: bytes) -> Beacon:
    """Parse a datagram.

    Raises
    ------
    ProtocolError
        If it is none of ours, is too large, or is damaged.
    VersionError
        If it is of a version that this process does not know.
    """
    if not datagram.startswith(MAGIC):
        raise ProtocolError("datagram is no beacon")
    data, max_bytes = memoryview(datagram)[len(MAGIC) :], limits.BEACON_MAX_BYTES - len(MAGIC)
    version = wire.decode(data, _Versioned, max_bytes=max_bytes).version
    if version != VERSION:
        raise VersionError(f"beacon has version {version}; this process knows version {VERSION}")
    return wire.decode(data, Beacon, max_bytes=max_bytes)


def addresses_to_tell(addresses: Sequence[Address], interface_ip: str) -> tuple[Address, ...]:
    """Return which of ``addresses`` to tell on the interface with that IPv4 address, the most useful first.

    The loopback interface is heard by this host alone, so its beacons tell everything, loopback first; others
    hear nothing of loopback.
    """
    if ipaddress.ip_address(interface_ip).is_loopback:
        chosen = sorted(addresses, key=lambda address: not is_loopback(address))
    else:
        prefix = f"/ip4/{interface_ip}/"
        others = [address for address in addresses if not is_loopback(address)]
        chosen = sorted(others, key=lambda address: not address.startswith(prefix))
    return tuple(chosen[: limits.ADDRESSES_PER_PEER_MAX_COUNT])


def hint_of(beacon: Beacon, sender_ip: str, *, same_host: bool) -> Hint | None:
    """Return what a beacon from ``sender_ip`` tells; None if no address in it can lead there."""
    addresses = [address for address in beacon.addresses if same_host or not is_loopback(address)]
    ports = {endpoint.port for address in addresses if (endpoint := parse_endpoint(address)) is not None}
    seen_at = f"/ip4/{sender_ip}/tcp/{beacon.port}"
    # A host that does not know the address it is seen at (a container, a bridge). It must listen there: a port
    # of what it says is one; what listens on loopback alone is not reached at another address.
    reachable = beacon.port in ports
    if reachable and seen_at not in addresses and not (same_host and is_loopback(seen_at)):
        addresses.append(seen_at)
    addresses.sort(key=lambda address: address != seen_at)
    if not addresses:
        return None
    return Hint(
        beacon.peer_id,
        tuple(addresses[: limits.ADDRESSES_PER_PEER_MAX_COUNT]),
        LAN,
        same_host=same_host,
        fresh=beacon.wants_answer,
    )


@dataclass(slots=True)
class TokenBucket:
    """Lets ``burst`` events pass at once and ``per_s`` a second after that."""

    burst: float
    per_s: float
    filled_at: float
    tokens: float

    @classmethod
    def full(cls, burst: float, per_s: float, now: float) -> TokenBucket:
        return cls(burst, per_s, now, burst)

    def take(self, now: float) -> bool:
        """Whether one more event may pass."""
        self.tokens = min(self.burst, self.tokens + (now - self.filled_at) * self.per_s)
        self.filled_at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class BeaconMachine:
    """Decides when to send beacons and which received ones to believe.

    Parameters
    ----------
    me, mesh_tag
        This process and its mesh: beacons of either or of others are told apart by these.
    """

    def __init__(self, me: PeerId, mesh_tag: bytes, *, entropy: Entropy, now: float) -> None:
        self._me = me
        self._mesh_tag = mesh_tag
        self._entropy = entropy
        self._questions_at = [
            now + offset + entropy.uniform(0.0, limits.BEACON_START_JITTER_S) for offset in limits.BEACON_START_TIMES_S
        ]
        self._regular_at = now + self._interval()
        self._answer_at: float | None = None
        self._last_sent_at = float("-inf")
        self._newcomers: OrderedDict[PeerId, float] = OrderedDict()
        self._all = TokenBucket.full(limits.BEACONS_BURST_COUNT, limits.BEACONS_PER_S, now)
        self._hosts: OrderedDict[str, TokenBucket] = OrderedDict()
        self.heard_count = 0
        self.ignored_count = 0
        self.dropped_count = 0

    def next_wakeup(self) -> float:
        """Return when to call :meth:`due`."""
        times = [self._regular_at, *self._questions_at[:1]]
        return min(times if self._answer_at is None else [*times, self._answer_at])

    def due(self, now: float) -> bool | None:
        """Return whether a beacon is to be sent now (None: no), and whether it asks for answers."""
        asked = bool(self._questions_at) and self._questions_at[0] <= now
        if asked:
            self._questions_at = [at for at in self._questions_at if at > now]
        elif self._regular_at > now and (self._answer_at is None or self._answer_at > now):
            return None
        # Whatever it was for, it tells all that the others would have told.
        self._answer_at = None
        self._last_sent_at = now
        self._regular_at = now + self._interval()
        return asked

    def received(self, datagram: bytes, sender_ip: str, now: float, *, same_host: bool) -> Hint | None:
        """Take in a datagram; return what it tells, if it is to be believed."""
        if not self._admit(sender_ip, now):
            self.dropped_count += 1
            return None
        try:
            beacon = decode_beacon(datagram)
        except ProtocolError:
            self.ignored_count += 1
            return None
        if beacon.peer_id == self._me:
            return None
        if beacon.mesh_tag != self._mesh_tag:
            self.ignored_count += 1
            return None
        self.heard_count += 1
        if beacon.wants_answer:
            self._asked_by(beacon.peer_id, now)
        return hint_of(beacon, sender_ip, same_host=same_host)

    def _asked_by(self, peer_id: PeerId, now: float) -> None:
        """Answer, unless a beacon went out since this newcomer began to ask, or will at once."""
        since = self._newcomers.get(peer_id)
        if since is None or now - since > limits.BEACON_NEWCOMER_S:
            since = self._newcomers[peer_id] = now
            self._newcomers.move_to_end(peer_id)
            if len(self._newcomers) > limits.BEACON_NEWCOMERS_MAX_COUNT:
                self._newcomers.popitem(last=False)
        if self._last_sent_at < since and self._answer_at is None:
            delay = self._entropy.uniform(limits.BEACON_ANSWER_DELAY_MIN_S, limits.BEACON_ANSWER_DELAY_MAX_S)
            self._answer_at = now + delay

    def _admit(self, sender_ip: str, now: float) -> bool:
        host = self._hosts.get(sender_ip)
        if host is None:
            if len(self._hosts) >= limits.BEACON_HOSTS_MAX_COUNT:
                self._hosts.popitem(last=False)
            host = TokenBucket.full(limits.BEACONS_PER_HOST_BURST_COUNT, limits.BEACONS_PER_HOST_PER_S, now)
            self._hosts[sender_ip] = host
        else:
            self._hosts.move_to_end(sender_ip)
        return host.take(now) and self._all.take(now)

    def _interval(self) -> float:
        return limits.BEACON_INTERVAL_S * self._entropy.uniform(0.8, 1.2)
