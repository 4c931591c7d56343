"""What this process holds of others' capability records: bounded, whoever asks it to hold more.

A machine without I/O. One record per publisher, under the keys that are its own. When it is full, whoever shares an
address with most others makes way, so that a flood from one address displaces itself and nobody else. A key that is
full among different addresses takes no more: the rest is to be stored under keys below it (see :mod:`.labels`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sparkle_mesh import limits
from sparkle_mesh.capabilities.records import Secrets, SignedRecord, open_filed
from sparkle_mesh.errors import ProtocolError
from sparkle_mesh.fabric.interface import PeerId


@dataclass(slots=True)
class _Held:
    record: SignedRecord
    keys: frozenset[bytes]
    #: What its publisher is connected from: an IP address, or whatever stands for one.
    origin: str
    renewed_at: float
    #: When its publisher last was heard to be there.
    heard_at: float

    def is_over(self, now: float) -> bool:
        unrenewed = now - self.renewed_at >= limits.CAPABILITY_UNRENEWED_MAX_S
        return unrenewed or now - self.heard_at >= self.record.lifetime_s


class RecordStore:
    """The records held.

    Parameters
    ----------
    secrets
        Of the mesh: what is not signed and sealed for it is refused.
    max_count, max_bytes, per_key_max_count, per_origin_max_count
        Bounds; see ``limits``. Whoever publishes what is over the first is told that there is no room at its keys.
    """

    def __init__(
        self,
        secrets: Secrets,
        *,
        max_count: int = limits.CAPABILITIES_HELD_MAX_COUNT,
        max_bytes: int = limits.CAPABILITIES_HELD_MAX_BYTES,
        per_key_max_count: int = limits.CAPABILITIES_PER_KEY_MAX_COUNT,
        per_origin_max_count: int = limits.CAPABILITIES_PER_ADDRESS_MAX_COUNT,
    ) -> None:
        self._secrets = secrets
        self._max_count, self._max_bytes = max_count, max_bytes
        self._per_key_max_count, self._per_origin_max_count = per_key_max_count, per_origin_max_count
        self._held: dict[PeerId, _Held] = {}
        self._by_key: dict[bytes, dict[PeerId, _Held]] = {}
        # Keys at which there was no room, and when that was last.
        self._overflowed_at: dict[bytes, float] = {}
        self._nbytes = 0
        self._displaced: list[PeerId] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """What all records held count for."""
        return self._nbytes

    def store(
        self, record: SignedRecord, keys: Iterable[bytes], now: float, *, sender: PeerId, origin: str
    ) -> frozenset[bytes]:
        """Hold ``record`` under ``keys``; return those at which there is no room, and under which it is not held.

        Parameters
        ----------
        sender, origin
            Who sent it, authenticated, and the address it is connected from.

        Raises
        ------
        ProtocolError
            If it is not the sender's own, is not signed and sealed as it should be, is filed under keys that are not
            its own, or is older than one that is held; or if there is no room for it.
        """
        wanted = frozenset(keys)
        if record.publisher != sender:
            raise ProtocolError(f"{sender} sent a record of {record.publisher}; everybody stores their own")
        if not wanted:
            raise ProtocolError(f"a record of {sender} is filed under no key")
        held = self._held.get(sender)
        if held is not None and held.record.sequence >= record.sequence and held.record != record:
            raise StaleRecordError(sender, record.sequence, held.record.sequence)
        open_filed(record, wanted, self._secrets)
        if held is not None:
            wanted |= held.keys if held.record == record else frozenset()
            self._remove(sender)
        try:
            self._make_room(record, origin, now)
        except ProtocolError:
            if held is not None:
                self._hold(sender, held)
            raise
        has_room = len(self._held) < self._max_count or self._displace_one(self._held, origin)
        full = frozenset(key for key in wanted if not has_room or not self._has_room_at(key, origin))
        wanted -= full
        self._overflowed_at.update(dict.fromkeys(full, now))
        if not wanted:
            return full
        self._hold(sender, _Held(record, wanted, origin, renewed_at=now, heard_at=now))
        return full

    def _hold(self, publisher: PeerId, held: _Held) -> None:
        self._held[publisher] = held
        self._nbytes += held.record.nbytes
        for key in held.keys:
            self._by_key.setdefault(key, {})[publisher] = held

    def take_displaced(self) -> list[PeerId]:
        """Return whose records made way for others since this was last asked: nobody else tells them."""
        displaced, self._displaced = self._displaced, []
        return displaced

    def has_overflowed(self, key: bytes, now: float) -> bool:
        """Whether there may be records under keys below ``key``, because there was no room for them here."""
        at = self._overflowed_at.get(key)
        return at is not None and now - at < limits.CAPABILITY_OVERFLOW_S

    def renew(self, publisher: PeerId, sequence: int, keys: Iterable[bytes], now: float) -> frozenset[bytes]:
        """Keep what ``publisher`` has stored, under ``keys`` alone; return those of them it is not held under."""
        wanted = frozenset(keys)
        held = self._held.get(publisher)
        if held is None or held.is_over(now) or held.record.sequence != sequence:
            return wanted
        if not wanted & held.keys:
            self._remove(publisher)
            return wanted
        for key in held.keys - wanted:
            self._unfile(publisher, key)
        held.keys &= wanted
        held.renewed_at = held.heard_at = now
        return wanted - held.keys

    def heard(self, publisher: PeerId, now: float) -> bool:
        """``publisher`` is there: keep what it has stored for another lifetime; False if that is nothing."""
        held = self._held.get(publisher)
        if held is None or held.is_over(now):
            return False
        held.heard_at = now
        return True

    def withdraw(self, publisher: PeerId) -> None:
        """Forget what ``publisher`` has stored; no error if that is nothing."""
        if publisher in self._held:
            self._remove(publisher)

    def get(self, key: bytes, now: float) -> Iterator[tuple[SignedRecord, float]]:
        """Yield the records under ``key`` with how long ago their publishers were heard (seconds), the least first."""
        entries = sorted(self._by_key.get(key, {}).values(), key=lambda held: -held.heard_at)
        return ((held.record, now - held.heard_at) for held in entries if not held.is_over(now))

    def expire(self, now: float) -> None:
        """Forget what has outlived itself."""
        for publisher in [publisher for publisher, held in self._held.items() if held.is_over(now)]:
            self._remove(publisher)
        over = [key for key, at in self._overflowed_at.items() if now - at >= limits.CAPABILITY_OVERFLOW_S]
        for key in over:
            del self._overflowed_at[key]

    def _has_room_at(self, key: bytes, origin: str) -> bool:
        """Whether one more fits under ``key``, if need be in the place of one of the busiest address."""
        crowd = self._by_key.get(key, {})
        return len(crowd) < self._per_key_max_count or self._displace_one(crowd, origin)

    def _displace_one(self, crowd: dict[PeerId, _Held], origin: str) -> bool:
        """Make one of ``crowd`` make way for one at ``origin``; False if the latter has as many as any other."""
        counts = Counter(held.origin for held in crowd.values())
        busiest, count = counts.most_common(1)[0]
        if count <= counts[origin] + 1:
            return False
        displaced = next(publisher for publisher, held in crowd.items() if held.origin == busiest)
        self._remove(displaced)
        self._displaced.append(displaced)
        return True

    def _make_room(self, record: SignedRecord, origin: str, now: float) -> None:
        self.expire(now)
        if sum(held.origin == origin for held in self._held.values()) >= self._per_origin_max_count:
            raise ProtocolError(f"{self._per_origin_max_count} records are held for peers at {origin}; no more are")
        while self._held and self._nbytes + record.nbytes > self._max_bytes:
            if not self._displace_one(self._held, origin):
                raise ProtocolError(f"there is no room for another record: {len(self._held)} are held")

    def _remove(self, publisher: PeerId) -> None:
        held = self._held.pop(publisher)
        self._nbytes -= held.record.nbytes
        for key in held.keys:
            self._unfile(publisher, key)

    def _unfile(self, publisher: PeerId, key: bytes) -> None:
        del self._by_key[key][publisher]
        if not self._by_key[key]:
            del self._by_key[key]


class StaleRecordError(ProtocolError):
    """A record is older than the one that is held, or another of the same number."""

    def __init__(self, publisher: PeerId, sequence: int, held_sequence: int) -> None:
        super().__init__(f"record {sequence} of {publisher} is stale: number {held_sequence} is held")
        self.held_sequence = held_sequence
