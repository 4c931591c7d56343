"""One lookup: asking ever closer peers until those closest to a key have answered.

Kademlia's node lookup (see :mod:`.routing_table` for the source) as a machine without I/O, within
:class:`LookupBounds`. A peer that takes long does not hold the lookup up: after a while the next is asked beside it.
Of each answer only some peers are taken, in all only so many are asked, and the lookup has a deadline: so that one who
names peers that it made up costs little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sparkle_mesh import limits
from sparkle_mesh.discovery.addresses import dialable, is_peer_id_text
from sparkle_mesh.discovery.routing_table import distance, key_of_peer
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.networks import network_of
from sparkle_mesh.wire import PeerAddress


@dataclass(frozen=True, slots=True)
class LookupBounds:
    """What one lookup may cost.

    Attributes
    ----------
    parallel_count, peers_max_count
        Peers asked at a time, and in all.
    named_max_count
        Peers taken from one answer.
    patience_s
        After how long the next one is asked beside one that has not answered.
    """

    parallel_count: int = limits.LOOKUP_PARALLEL_COUNT
    peers_max_count: int = limits.LOOKUP_PEERS_MAX_COUNT
    named_max_count: int = limits.LOOKUP_NAMED_MAX_COUNT
    patience_s: float = limits.LOOKUP_PATIENCE_S


_OWN_DHT = LookupBounds()


@dataclass(slots=True)
class _Candidate:
    named: PeerAddress
    distance: int
    #: Public ones that it is said to listen in; once it has answered, the one that it has answered from.
    networks: frozenset[str]
    #: None before it is asked.
    asked_at: float | None = None
    answered: bool = False
    failed: bool = False

    @property
    def in_flight(self) -> bool:
        return self.asked_at is not None and not self.answered and not self.failed


class Lookup:
    """The state of one lookup.

    Parameters
    ----------
    key
        What is looked for: 32 bytes.
    me
        This process's peer id; it is never asked.
    start
        Peers to begin with.
    now, timeout_s
        The lookup is over at ``now + timeout_s`` at the latest.
    count
        How many of the closest peers are to have answered.
    place_of
        Where a peer is in the space of keys (32 bytes).
    bounds
        What it may cost.
    """

    def __init__(
        self,
        key: bytes,
        me: PeerId,
        start: Iterable[PeerAddress],
        *,
        now: float,
        timeout_s: float = limits.LOOKUP_TIMEOUT_S,
        count: int = limits.CAPABILITY_HOLDERS_COUNT,
        place_of: Callable[[PeerId], bytes] = key_of_peer,
        bounds: LookupBounds = _OWN_DHT,
    ) -> None:
        self._place_of, self._bounds = place_of, bounds
        self._key, self._me, self._count = key, me, count
        self._deadline = now + timeout_s
        self._candidates: dict[PeerId, _Candidate] = {}
        self._add(start)

    def _add(self, peers: Iterable[PeerAddress]) -> None:
        for named in peers:
            peer_id = named.peer_id
            if peer_id != self._me and peer_id not in self._candidates:
                networks = frozenset(filter(None, map(network_of, named.addresses)))
                self._candidates[peer_id] = _Candidate(named, distance(self._key, self._place_of(peer_id)), networks)

    def due(self, now: float) -> list[PeerAddress]:
        """Return whom to ask now; tell ``answered`` or ``failed`` of each."""
        if now >= self._deadline:
            return []
        waiting = sum(c.in_flight and not self._is_slow(c, now) for c in self._all())
        room = min(self._bounds.parallel_count - waiting, self._bounds.peers_max_count - self._asked_count())
        chosen = [candidate for candidate in self._front(now) if candidate.asked_at is None][: max(room, 0)]
        for candidate in chosen:
            candidate.asked_at = now
        return [candidate.named for candidate in chosen]

    def next_wakeup(self, now: float) -> float:
        """Return when to call :meth:`due` again if nothing happens before."""
        patience = [c.asked_at + self._bounds.patience_s for c in self._all() if c.in_flight and c.asked_at is not None]
        return min([self._deadline, *(time for time in patience if time > now)])

    def answered(
        self, peer_id: PeerId, closer: Iterable[PeerAddress], *, remote_address: Address | None = None
    ) -> None:
        """``peer_id`` has answered, and names peers that it holds to be closer.

        Its network is that of ``remote_address``, which it is connected from or to, whatever it is said to listen at.
        """
        candidate = self._candidates.get(peer_id)
        if candidate is None or not candidate.in_flight:
            return
        candidate.answered = True
        network = network_of(remote_address)
        if network is not None:
            candidate.networks = frozenset({network})
        named = [peer for peer in closer if is_peer_id_text(peer.peer_id)]
        named.sort(key=lambda peer: distance(self._key, self._place_of(peer.peer_id)))
        self._add(
            PeerAddress(peer.peer_id, dialable(peer.peer_id, peer.addresses))
            for peer in named[: self._bounds.named_max_count]
        )

    def failed(self, peer_id: PeerId) -> None:
        """``peer_id`` could not be asked, or did not answer."""
        candidate = self._candidates.get(peer_id)
        if candidate is not None and candidate.in_flight:
            candidate.failed = True

    def is_over(self, now: float) -> bool:
        """Whether the closest have answered, nobody is left to ask, or the time is up."""
        if now >= self._deadline:
            return True
        unanswered = [candidate for candidate in self._front(now) if not candidate.answered]
        if any(candidate.in_flight for candidate in unanswered):
            return False
        if unanswered and self._asked_count() < self._bounds.peers_max_count:
            return False
        # Those that are slow are waited for only where too few others have answered.
        return len(self.closest()) == self._count or not any(candidate.in_flight for candidate in self._all())

    def closest(self) -> list[PeerAddress]:
        """Return those that have answered, the closest first, ``count`` at most, and few of one network."""
        return [candidate.named for candidate in self._few_of_each(c for c in self._ordered() if c.answered)]

    def _is_slow(self, candidate: _Candidate, now: float) -> bool:
        return candidate.asked_at is not None and now >= candidate.asked_at + self._bounds.patience_s

    def _all(self) -> Iterable[_Candidate]:
        return self._candidates.values()

    def _ordered(self) -> list[_Candidate]:
        return sorted(self._candidates.values(), key=lambda candidate: candidate.distance)

    def _asked_count(self) -> int:
        return sum(candidate.asked_at is not None for candidate in self._all())

    def _front(self, now: float) -> list[_Candidate]:
        """Those that matter now: the closest ``count``, without those that have failed or are slow."""
        usable = (c for c in self._ordered() if not c.failed and not (c.in_flight and self._is_slow(c, now)))
        return self._few_of_each(usable)

    def _few_of_each(self, candidates: Iterable[_Candidate]) -> list[_Candidate]:
        """Return the first ``count``, without those whose network has its share: a crowd must not be all of them."""
        chosen: list[_Candidate] = []
        shares: Counter[str] = Counter()
        for candidate in candidates:
            if len(chosen) == self._count:
                break
            if all(shares[network] < limits.LOOKUP_NETWORK_MAX_COUNT for network in candidate.networks):
                shares.update(candidate.networks)
                chosen.append(candidate)
        return chosen
