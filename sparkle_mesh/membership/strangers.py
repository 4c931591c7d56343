"""Who is connected and has not proven that it is of the mesh: a machine without I/O.

Anybody who reaches the port may connect with an identity made up a moment ago, and say nothing. So strangers are few,
few of one address, and stay briefly: one more takes the place of the oldest of the address that has most of them. Who
is of the mesh proves it in two round trips, long before its turn comes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import PeerId


@dataclass(slots=True)
class _Stranger:
    source: str
    until: float


class Strangers:
    """The connected peers that have not proven anything yet."""

    def __init__(
        self,
        *,
        max_count: int = limits.STRANGERS_MAX_COUNT,
        per_source_max_count: int = limits.STRANGERS_PER_ADDRESS_MAX_COUNT,
        stay_max_s: float = limits.STRANGER_STAY_MAX_S,
    ) -> None:
        self._max_count, self._per_source_max_count, self._stay_max_s = max_count, per_source_max_count, stay_max_s
        # In order of arrival.
        self._strangers: dict[PeerId, _Stranger] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._strangers)

    def __contains__(self, peer_id: PeerId) -> bool:
        return peer_id in self._strangers

    def came(self, peer_id: PeerId, source: str, now: float) -> PeerId | None:
        """``peer_id`` is connected from ``source``, an address; return who has to make way for it, if anybody."""
        if peer_id in self._strangers:
            return None
        leaves = None
        if self._counts[source] >= self._per_source_max_count:
            leaves = self._oldest_of(source)
        elif len(self._strangers) >= self._max_count:
            leaves = self._oldest_of(self._counts.most_common(1)[0][0])
        if leaves is not None:
            self.went(leaves)
        self._strangers[peer_id] = _Stranger(source, now + self._stay_max_s)
        self._counts[source] += 1
        return leaves

    def _oldest_of(self, source: str) -> PeerId:
        return next(peer_id for peer_id, stranger in self._strangers.items() if stranger.source == source)

    def went(self, peer_id: PeerId) -> None:
        """``peer_id`` is a stranger no more: it has proven itself, or it is not connected."""
        stranger = self._strangers.pop(peer_id, None)
        if stranger is not None:
            self._counts[stranger.source] -= 1
            if not self._counts[stranger.source]:
                del self._counts[stranger.source]

    def overdue(self, now: float) -> list[PeerId]:
        """Return those who have been strangers for too long. One that is not let go is named again after as long."""
        late = [peer_id for peer_id, stranger in self._strangers.items() if stranger.until <= now]
        for peer_id in late:
            stranger = self._strangers.pop(peer_id)
            stranger.until = now + self._stay_max_s
            self._strangers[peer_id] = stranger
        return late

    def next_wakeup(self) -> float | None:
        """Return when to call :meth:`overdue` next; None if there is nobody."""
        return next((stranger.until for stranger in self._strangers.values()), None)
