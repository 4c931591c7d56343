"""Who was heard of, where, and whom to dial when: a pure machine, ``(event, now) -> dials``.

Everything told here is a hint until the dial proves it, and anybody on the network may have made it up. So:

- The table is bounded. When it is full the source with the most peers in it gives one up, so a flood from one
  source displaces its own. Connected, configured and just-dialed peers are never displaced.
- Dials at once are bounded, and each source may occupy only some of them: made-up addresses that swallow
  packets until the timeout cannot starve the others.
- Whom to be connected to at all, and how many, is :class:`.degree.Degree`'s to say; among equals it is drawn, so that
  nobody gets dialed more for being told of more.
- A failed dial is tried again with exponential backoff and jitter; a peer that refused (it is not of this
  mesh) is left alone for long.

Two processes that start together hear of each other at the same moment. If both dialed, half of all
handshakes would be thrown away, so the one with the smaller peer id dials and the other waits for a grace.
That holds for sources that tell both sides (multicast, this host's registry); what only this side may have
heard (a configured address, what other peers told) is dialed at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.discovery.addresses import dialable, is_loopback, is_peer_id_text
from sparkle_mesh.discovery.degree import Degree, Wish
from sparkle_mesh.fabric.interface import Address, PeerId

# Sources of hints, the most trusted first. Membership uses the names "introduction" (a peer that proved the
# mesh's key told its own addresses), "gossip" (it published them, signed) and "exchange" (about a third peer).
JOIN, HOST, INTRODUCTION, GOSSIP, LAN, CACHE, EXCHANGE = (
    "join", "host", "introduction", "gossip", "lan", "cache", "exchange",
)  # fmt: skip
INBOUND = "inbound"
_TRUST = {source: rank for rank, source in enumerate((JOIN, HOST, INTRODUCTION, GOSSIP, LAN, CACHE, EXCHANGE))}
_OTHER_TRUST = len(_TRUST)
# They tell both sides at about the same time.
_MUTUAL = frozenset({HOST, LAN})
# The peer itself tells all its addresses: what it told before and no longer tells is outdated.
_FIRST_HAND = frozenset({HOST, INTRODUCTION, GOSSIP, LAN})


@dataclass(frozen=True, slots=True)
class Hint:
    """That ``peer_id`` may be found at ``addresses``.

    Attributes
    ----------
    same_host
        It is known to run on this host, so loopback addresses lead to it.
    fresh
        It seems to have started just now: failures to reach it before say nothing.
    role
        What it is said to be: ``"node"``, ``"trainer"``, or empty.
    """

    peer_id: PeerId
    addresses: tuple[Address, ...]
    source: str
    same_host: bool = False
    fresh: bool = False
    role: str = ""


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect to ``peer_id``, trying ``addresses`` in this order; then tell ``dial_succeeded`` or ``dial_failed``."""

    peer_id: PeerId
    addresses: tuple[Address, ...]


@dataclass(slots=True)
class _Place:
    """One address of a contact."""

    trust: int
    heard_at: float
    worked_at: float = float("-inf")


@dataclass(slots=True)
class Contact:
    """One peer that was heard of. ``due_at`` is when it may be dialed next, once an address is known."""

    peer_id: PeerId
    source: str
    first_heard_at: float
    last_heard_at: float
    places: dict[Address, _Place] = field(default_factory=dict)
    same_host: bool = False
    configured: bool = False
    due_at: float | None = None
    dialing: bool = False
    connected_at: float | None = None
    ever_connected: bool = False
    failures: int = 0
    last_failed_at: float = float("-inf")
    refusals: int = 0
    spared: bool = False
    last_error: str | None = None
    role: str = ""
    #: From this process, in the space of keys.
    distance: int = 0
    #: Drawn when it was heard of.
    lot: float = 0.0

    @property
    def trust(self) -> int:
        return _TRUST.get(self.source, _OTHER_TRUST)

    @property
    def connected(self) -> bool:
        return self.connected_at is not None

    @property
    def idle(self) -> bool:
        return not self.dialing and self.connected_at is None

    @property
    def hearsay(self) -> bool:
        """Whether others have named it, and nothing else is known."""
        return self.source in {EXCHANGE, GOSSIP}

    @property
    def waiting(self) -> bool:
        """Whether it is to be dialed once its time has come."""
        return self.idle and self.due_at is not None and bool(self.places)

    def dial_addresses(self) -> tuple[Address, ...]:
        """Addresses to try, those that worked first; loopback first on this host, else last or not at all."""

        def key(item: tuple[Address, _Place]) -> tuple[float, bool, int, float]:
            address, place = item
            return (-place.worked_at, is_loopback(address) != self.same_host, place.trust, -place.heard_at)

        ordered = [address for address, _ in sorted(self.places.items(), key=key)]
        # Another host's loopback addresses lead nowhere, but one that tells nothing else may be on this host.
        elsewhere = [address for address in ordered if not is_loopback(address)]
        return tuple(ordered if self.same_host or self.configured or not elsewhere else elsewhere)


class Directory:
    """The peers heard of.

    Parameters
    ----------
    me
        This process's peer id; hints about it are ignored.
    entropy
        For jitter.
    degree
        Says whom to be connected to; everybody, unless it is given.
    contacts_max_count, dials_max_count, dials_per_source_max_count
        Bounds; see ``limits``.
    """

    def __init__(
        self,
        me: PeerId,
        *,
        entropy: Entropy,
        degree: Degree | None = None,
        contacts_max_count: int = limits.DISCOVERY_CONTACTS_MAX_COUNT,
        dials_max_count: int = limits.DISCOVERY_DIALS_MAX_COUNT,
        dials_per_source_max_count: int = limits.DISCOVERY_DIALS_PER_SOURCE_MAX_COUNT,
    ) -> None:
        self._me = me
        self._entropy = entropy
        self._degree = Degree(me, "") if degree is None else degree
        self._contacts_max_count = contacts_max_count
        self._dials_max_count = dials_max_count
        self._dials_per_source_max_count = dials_per_source_max_count
        self._contacts: dict[PeerId, Contact] = {}
        self._dialing: dict[PeerId, str] = {}
        self._tidied_at = float("-inf")

    def __len__(self) -> int:
        return len(self._contacts)

    def get(self, peer_id: PeerId) -> Contact | None:
        """Return what is known of ``peer_id``; the caller must not change it."""
        return self._contacts.get(peer_id)

    def contacts(self) -> Iterable[Contact]:
        """Return all contacts; the caller must not change them."""
        return self._contacts.values()

    # --- What happened --------------------------------------------------------------------------

    def heard(self, hint: Hint, now: float) -> bool:
        """Take in a hint; return whether it may have moved the next wake-up."""
        addresses = dialable(hint.peer_id, hint.addresses)
        if hint.peer_id == self._me or not is_peer_id_text(hint.peer_id):
            return False
        contact = self._contacts.get(hint.peer_id)
        if contact is None:
            contact = self._add(hint.peer_id, hint.source, now) if addresses else None
        if contact is None:
            return False
        contact.last_heard_at = now
        contact.same_host = contact.same_host or hint.same_host
        contact.configured = contact.configured or hint.source == JOIN
        if _TRUST.get(hint.source, _OTHER_TRUST) < contact.trust:
            contact.source = hint.source
        if hint.source == INTRODUCTION:
            # It has just been admitted: whatever it was refused for is over.
            contact.refusals = 0
        if contact.role != "trainer" or hint.source == INTRODUCTION:
            # Whoever others say is a node may be a trainer, that is to be found.
            contact.role = hint.role or contact.role
        self._merge(contact, addresses, hint.source, now)
        return contact.idle and self._reschedule(contact, hint, now) and self._is_wanted(contact, self._wish())

    def connected(
        self, peer_id: PeerId, now: float, *, remote_address: Address | None = None, outbound: bool = False
    ) -> None:
        """A connection to ``peer_id`` stands; ``remote_address`` is where it is from or to."""
        if peer_id == self._me:
            return
        contact = self._contacts.get(peer_id) or self._add(peer_id, INBOUND, now)
        if contact is None:
            return
        if contact.connected_at is None:
            contact.connected_at = now
        contact.ever_connected, contact.spared = True, False
        self._degree.came(
            peer_id,
            now,
            role=contact.role,
            chosen=contact.dialing,
            asked=outbound and not contact.dialing,
            configured=contact.configured,
            remote_address=remote_address,
        )
        if remote_address is not None:
            contact.same_host = contact.same_host or is_loopback(remote_address)
            place = contact.places.get(remote_address)
            if place is not None:
                place.worked_at = now

    def disconnected(self, peer_id: PeerId, now: float) -> None:
        """The last connection to ``peer_id`` is gone."""
        self._degree.went(peer_id)
        contact = self._contacts.get(peer_id)
        if contact is None or contact.connected_at is None:
            return
        stable = now - contact.connected_at >= limits.DISCOVERY_STABLE_CONNECTION_S
        contact.connected_at = None
        if contact.refusals or contact.spared:
            # It was most likely let go for that; when to try again is settled.
            return
        if not contact.places:
            if not contact.configured:
                self._drop(contact)
        elif stable:
            contact.failures = 0
            # Most likely the process ended. If not, give a connection that broke a moment to break on both sides.
            contact.due_at = now + self._entropy.uniform(0.5, 1.0) + self._grace(contact)
        else:
            self._back_off(contact, now, "the connection ended soon after it stood")

    def dial_succeeded(self, peer_id: PeerId, now: float, *, remote_address: Address | None = None) -> None:
        """The dial of ``peer_id`` ended and a connection stands."""
        # In this order: it was dialed for its own sake.
        self.connected(peer_id, now, remote_address=remote_address)
        self._dial_ended(peer_id)

    def dial_failed(self, peer_id: PeerId, now: float, reason: str) -> None:
        """The dial of ``peer_id`` ended without a connection."""
        self._dial_ended(peer_id)
        contact = self._contacts.get(peer_id)
        if contact is None or contact.connected:
            return
        for place in contact.places.values():
            place.worked_at = float("-inf")
        self._back_off(contact, now, reason)

    def refused(self, peer_id: PeerId, now: float, reason: str = "it is not of this mesh") -> None:
        """``peer_id`` was reached but is not of this mesh: leave it alone for long."""
        if peer_id == self._me:
            return
        contact = self._contacts.get(peer_id) or self._add(peer_id, INBOUND, now)
        if contact is not None:
            contact.refusals += 1
            self._back_off(contact, now, reason)

    def spared(self, peer_id: PeerId, now: float) -> None:
        """Of ``peer_id`` and this process one has enough peers: no failure, and nothing to be tried again soon."""
        contact = self._contacts.get(peer_id)
        if contact is None:
            return
        others = len(self._degree) - contact.connected
        pause = limits.SPARED_BACKOFF_S if others > 0 else limits.SPARED_ALONE_BACKOFF_S
        contact.spared, contact.failures = True, 0
        contact.due_at = now + pause * self._entropy.uniform(0.75, 1.25)

    # --- What to do -----------------------------------------------------------------------------

    def due(self, now: float) -> list[Dial]:
        """Return whom to dial now. Each is to be followed by ``dial_succeeded`` or ``dial_failed``."""
        self._forget(now)
        dials: list[Dial] = []
        for contact in self._ready(now):
            contact.dialing = True
            self._dialing[contact.peer_id] = contact.source
            dials.append(Dial(contact.peer_id, contact.dial_addresses()))
        return dials

    def next_wakeup(self, now: float) -> float | None:
        """Return when to call :meth:`due` next if nothing happens before; None if only an event brings work."""
        if len(self._dialing) >= self._dials_max_count:
            return None
        busy, wish = Counter(self._dialing.values()), self._wish()
        times = [
            contact.due_at
            for contact in self._contacts.values()
            if contact.due_at is not None
            and contact.waiting
            and self._is_wanted(contact, wish)
            and busy[contact.source] < self._source_share(contact)
        ]
        return max(now, min(times)) if times else None

    def _ready(self, now: float) -> list[Contact]:
        """Choose among those that are wanted and whose time has come.

        Those that are near first, the nearest of them before; then the most trusted, the least often failed, the
        longest due; where not all are wanted, those of this host, and then by lot.
        """
        busy, wish = Counter(self._dialing.values()), self._wish()
        free = self._dials_max_count - len(self._dialing)
        candidates = [
            c
            for c in self._contacts.values()
            if c.due_at is not None and c.due_at <= now and c.waiting and self._is_wanted(c, wish)
        ]
        must = [c for c in candidates if c.configured or wish.takes_beyond_room(c.role, c.hearsay, c.distance)]
        by_lot = len(candidates) - len(must) > wish.room
        candidates.sort(key=lambda c: (not c.configured, *self._rank(c, wish, by_lot), c.failures, c.due_at))
        room = wish.room
        chosen: list[Contact] = []
        for contact in candidates:
            if len(chosen) == free:
                break
            if busy[contact.source] >= self._source_share(contact):
                continue
            if contact not in must and room <= 0:
                continue
            room -= 1
            busy[contact.source] += 1
            chosen.append(contact)
        return chosen

    def _rank(self, contact: Contact, wish: Wish, by_lot: bool) -> tuple[float, float, float]:
        if contact.distance < wish.nearer_than:
            return (0.0, contact.failures, contact.distance)
        return (1.0, not contact.same_host, contact.failures + contact.lot) if by_lot else (1.0, contact.trust, 0.0)

    def _wish(self) -> Wish:
        return self._degree.wish(len(self._dialing))

    def _is_wanted(self, contact: Contact, wish: Wish) -> bool:
        return contact.configured or wish.takes(contact.role, contact.hearsay, contact.distance)

    def _source_share(self, contact: Contact) -> int:
        return self._dials_max_count if contact.configured else self._dials_per_source_max_count

    # --- Inside ---------------------------------------------------------------------------------

    def _merge(self, contact: Contact, addresses: Sequence[Address], source: str, now: float) -> None:
        trust = _TRUST.get(source, _OTHER_TRUST)
        places = contact.places
        if addresses and source in _FIRST_HAND:
            for old in [a for a, place in places.items() if place.trust == trust and a not in addresses]:
                del places[old]
        for address in addresses:
            place = places.get(address)
            if place is None:
                places[address] = _Place(trust, now)
            else:
                place.trust = min(place.trust, trust)
                place.heard_at = now
        excess = len(places) - limits.ADDRESSES_PER_PEER_MAX_COUNT
        if excess > 0:
            worst = sorted(places, key=lambda a: (places[a].worked_at, -places[a].trust, places[a].heard_at))
            for address in worst[:excess]:
                del places[address]

    def _reschedule(self, contact: Contact, hint: Hint, now: float) -> bool:
        if contact.refusals or not contact.places:
            return False
        if contact.due_at is None:
            contact.due_at = now + self._first_delay(contact, hint)
            return True
        if hint.source not in _MUTUAL and contact.failures == 0 and not contact.ever_connected:
            # Perhaps only this side has heard of it: the grace would be for nothing.
            due_at = now + self._first_delay(contact, hint)
        elif hint.fresh and contact.failures:
            due_at = max(now, contact.last_failed_at + limits.DISCOVERY_FRESH_RETRY_S) + self._grace(contact)
        else:
            return False
        moved = due_at < contact.due_at
        contact.due_at = min(due_at, contact.due_at)
        return moved

    def _first_delay(self, contact: Contact, hint: Hint) -> float:
        if hint.source == JOIN:
            return 0.0
        if hint.source in _MUTUAL:
            return self._grace(contact)
        return self._entropy.uniform(0.0, limits.DISCOVERY_DIAL_JITTER_S)

    def _grace(self, contact: Contact) -> float:
        if contact.configured or self._me < contact.peer_id:
            return 0.0
        return limits.DISCOVERY_DIAL_GRACE_S * self._entropy.uniform(1.0, 1.5)

    def _back_off(self, contact: Contact, now: float, reason: str) -> None:
        contact.last_failed_at = now
        contact.last_error = reason
        if contact.refusals:
            shortest, longest = limits.DISCOVERY_REFUSED_BACKOFF_MIN_S, limits.DISCOVERY_REFUSED_BACKOFF_MAX_S
            count = contact.refusals
        else:
            contact.failures += 1
            shortest, count = limits.DISCOVERY_BACKOFF_MIN_S, contact.failures
            longest = limits.DISCOVERY_BACKOFF_MAX_S
            if contact.configured:
                longest = limits.DISCOVERY_CONFIGURED_BACKOFF_MAX_S
        delay = min(longest, shortest * 2.0 ** min(count - 1, 30))
        contact.due_at = now + delay * self._entropy.uniform(0.75, 1.25)

    def _dial_ended(self, peer_id: PeerId) -> None:
        self._dialing.pop(peer_id, None)
        contact = self._contacts.get(peer_id)
        if contact is not None:
            contact.dialing = False

    def _add(self, peer_id: PeerId, source: str, now: float) -> Contact | None:
        if not is_peer_id_text(peer_id):
            return None
        if len(self._contacts) >= self._contacts_max_count:
            self._make_room(source)
            if len(self._contacts) >= self._contacts_max_count:
                return None
        contact = Contact(peer_id, source, first_heard_at=now, last_heard_at=now, configured=source == JOIN)
        contact.distance, contact.lot = self._degree.distance_to(peer_id), self._entropy.uniform(0.0, 1.0)
        self._contacts[peer_id] = contact
        return contact

    def _make_room(self, newcomer_source: str) -> None:
        """Give up, of the source that has the most, the least promising.

        Several at once, so that a flood does not cost a look at the whole table for each that it makes up.
        """
        evictable = [c for c in self._contacts.values() if c.idle and not c.configured]
        if not evictable:
            return
        counts = Counter(contact.source for contact in evictable)
        counts[newcomer_source] += 1
        crowded = max(counts[contact.source] for contact in evictable)
        candidates = [c for c in evictable if counts[c.source] == crowded]
        # Between equals a newcomer displaces its own kind.
        candidates = [c for c in candidates if c.source == newcomer_source] or candidates
        candidates.sort(key=lambda c: (c.ever_connected, -c.failures, c.last_heard_at))
        batch_count = min(len(candidates) // 2, self._contacts_max_count // 32)
        for contact in candidates[: max(1, batch_count)]:
            self._drop(contact)

    def _drop(self, contact: Contact) -> None:
        del self._contacts[contact.peer_id]

    def _forget(self, now: float) -> None:
        """Drop those that were not reached and not heard of for long; of the cached, those that are not there."""
        if now < self._tidied_at + limits.DISCOVERY_TIDY_S:
            return
        self._tidied_at = now
        for contact in [c for c in self._contacts.values() if c.idle and not c.configured]:
            silent = now - contact.last_heard_at > limits.DISCOVERY_FORGET_S
            lost = silent and (contact.failures >= limits.DISCOVERY_FORGET_FAILURES_COUNT or not contact.places)
            gone = contact.source == CACHE and contact.failures >= limits.DISCOVERY_CACHED_FAILURES_COUNT
            if lost or gone:
                self._drop(contact)
