"""Peers that this process is connected to for what they serve to everybody, and not as peers of its mesh."""

from __future__ import annotations

from collections import Counter

from sparkle_mesh.fabric.interface import PeerId


class PublicPeers:
    """Those of the public DHT, bootstrap peers, relays: nobody asks them for a mesh's proof, or lets them go for it."""

    def __init__(self) -> None:
        self._held: Counter[PeerId] = Counter()

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._held

    def held_count(self, peer_id: PeerId) -> int:
        """Return how many need ``peer_id``."""
        return self._held[peer_id]

    def hold(self, peer_id: PeerId) -> None:
        """``peer_id`` is needed for what it serves, until it is released as often."""
        self._held[peer_id] += 1

    def release(self, peer_id: PeerId) -> None:
        """Undo one :meth:`hold`."""
        self._held[peer_id] -= 1
        if self._held[peer_id] <= 0:
            del self._held[peer_id]
