"""Whom to ask about a key: a Kademlia routing table that few addresses cannot fill.

After Maymounkov and Mazières, "Kademlia: A Peer-to-peer Information System Based on the XOR Metric" (2002): peers
and keys share one space of 256 bits, the distance of two is their XOR, and the table knows many peers near this one
and few far away. Peers that have answered for long are kept over new ones, so that a flood of new identities displaces
nobody, and of one network (an IPv4 /24, an IPv6 /48) only so many are taken in, so that one subnet cannot surround
a joining peer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.networks import network_of

KEY_BITS = 256


def key_of_peer(peer_id: PeerId) -> bytes:
    """Return the place of ``peer_id`` in the space of keys: SHA-256 of its text (32 bytes)."""
    return sha256(peer_id.encode()).digest()


def distance(one: bytes, other: bytes) -> int:
    """Return the XOR of two keys of 32 bytes as a number."""
    return int.from_bytes(one, "big") ^ int.from_bytes(other, "big")


@dataclass(slots=True)
class Route:
    """One peer of the table. ``answered_at`` is when it last did; ``failures`` counts since then."""

    peer_id: PeerId
    key: bytes
    addresses: tuple[Address, ...]
    network: str | None
    answered_at: float
    failures: int = 0
    role: Literal["", "node", "trainer"] = ""


class RoutingTable:
    """The peers that have answered, by distance.

    Parameters
    ----------
    me
        This process's peer id.
    bucket_max_count
        Peers at most in each of the 256 ranges of distance (Kademlia's *k*).
    network_bucket_max_count, network_max_count
        Of one network, at most, in one range and in all of them.
    """

    def __init__(
        self,
        me: PeerId,
        *,
        bucket_max_count: int = limits.ROUTING_BUCKET_MAX_COUNT,
        network_bucket_max_count: int = limits.ROUTING_NETWORK_BUCKET_MAX_COUNT,
        network_max_count: int = limits.ROUTING_NETWORK_MAX_COUNT,
    ) -> None:
        self._me = me
        self._key = key_of_peer(me)
        self._bucket_max_count = bucket_max_count
        self._network_bucket_max_count = network_bucket_max_count
        self._network_max_count = network_max_count
        self._buckets: dict[int, dict[PeerId, Route]] = {}
        self._routes: dict[PeerId, Route] = {}

    def __len__(self) -> int:
        return len(self._routes)

    def __contains__(self, peer_id: PeerId) -> bool:
        return peer_id in self._routes

    def get(self, peer_id: PeerId) -> Route | None:
        """Return what is known of ``peer_id``; the caller must not change it."""
        return self._routes.get(peer_id)

    def answered(
        self,
        peer_id: PeerId,
        addresses: Iterable[Address],
        now: float,
        *,
        remote_address: Address | None = None,
        role: Literal["", "node", "trainer"] = "",
    ) -> bool:
        """``peer_id`` has proven who it is, and answered; return whether it has a place in the table.

        Parameters
        ----------
        addresses
            Where it says that it listens.
        remote_address
            Where it is connected from or to: what its network is judged by.
        role
            What it says that it is, if that is known.
        """
        if peer_id == self._me:
            return False
        bounded = tuple(addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT]
        route = self._routes.get(peer_id)
        if route is not None:
            route.addresses, route.answered_at, route.failures = bounded or route.addresses, now, 0
            route.role = role or route.role
            return True
        key = key_of_peer(peer_id)
        index = distance(self._key, key).bit_length()
        bucket = self._buckets.get(index, {})
        network = network_of(remote_address)
        if network is not None and not self._has_room_for(network, bucket):
            return False
        if len(bucket) >= self._bucket_max_count and not self._displace_one(bucket):
            return False
        # What was displaced may have been the last of its range.
        bucket = self._buckets.setdefault(index, {})
        bucket[peer_id] = self._routes[peer_id] = Route(peer_id, key, bounded, network, now, 0, role)
        return True

    def _has_room_for(self, network: str, bucket: dict[PeerId, Route]) -> bool:
        in_bucket = sum(route.network == network for route in bucket.values())
        in_all = sum(route.network == network for route in self._routes.values())
        return in_bucket < self._network_bucket_max_count and in_all < self._network_max_count

    def _displace_one(self, bucket: dict[PeerId, Route]) -> bool:
        """Make room by letting one go that did not answer of late, if there is one."""
        worst = max(bucket.values(), key=lambda route: (route.failures, -route.answered_at))
        if worst.failures:
            self._remove(worst)
        return worst.failures > 0

    def failed(self, peer_id: PeerId) -> None:
        """``peer_id`` did not answer; after ``limits.ROUTING_FAILURES_MAX_COUNT`` times in a row it is dropped."""
        route = self._routes.get(peer_id)
        if route is not None:
            route.failures += 1
            if route.failures >= limits.ROUTING_FAILURES_MAX_COUNT:
                self._remove(route)

    def gone(self, peer_id: PeerId) -> None:
        """``peer_id`` has left, died or was banned."""
        route = self._routes.get(peer_id)
        if route is not None:
            self._remove(route)

    def _remove(self, route: Route) -> None:
        del self._routes[route.peer_id]
        index = distance(self._key, route.key).bit_length()
        del self._buckets[index][route.peer_id]
        if not self._buckets[index]:
            del self._buckets[index]

    def closest(self, key: bytes, count: int, *, but: PeerId | None = None) -> list[Route]:
        """Return the ``count`` peers closest to ``key`` (32 bytes), the closest first, without ``but``."""
        routes = (route for route in self._routes.values() if route.peer_id != but)
        return sorted(routes, key=lambda route: distance(key, route.key))[:count]
