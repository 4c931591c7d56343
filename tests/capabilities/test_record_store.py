"""What is held of others' records: their own, the newest, bounded."""

from __future__ import annotations

import msgspec
import pytest

from sparkle_mesh import limits
from sparkle_mesh.capabilities.labels import bits_of, index_labels, label_below
from sparkle_mesh.capabilities.records import CapabilityRecord, SignedRecord, sign_record
from sparkle_mesh.capabilities.store import RecordStore, StaleRecordError
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import AuthenticationError, ProtocolError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.keys import MeshSecrets

SECRETS = MeshSecrets("a mesh", None)
LIFE_S = limits.CAPABILITY_LIFETIME_S


class Publisher:
    def __init__(self, number: int, *, kind: str = "cpu") -> None:
        self.identity = Identity(number.to_bytes(32, "big"))
        self.peer_id = self.identity.peer_id
        device = DeviceInfo(kind=kind, index=0, name=kind, memory_bytes=0)
        self.record = CapabilityRecord(host_id=b"h" * 16, role="trainer", software="s", addresses=(), devices=(device,))
        self.keys = frozenset(map(SECRETS.locate, index_labels(self.record.role, self.record.devices)))
        self.shared_key = SECRETS.locate(f"device 0 {kind}")

    def signed(self, sequence: int = 1) -> SignedRecord:
        return sign_record(self.record, self.identity, SECRETS, sequence=sequence)

    def store_at(
        self, store: RecordStore, now: float = 0.0, *, sequence: int = 1, origin: str = "/ip4/10.0.0.1"
    ) -> None:
        store.store(self.signed(sequence), self.keys, now, sender=self.peer_id, origin=origin)


def held(store: RecordStore, key: bytes, now: float) -> list[tuple[str, float]]:
    return [(record.publisher, age_s) for record, age_s in store.get(key, now)]


def test_held_with_its_age_until_it_is_renewed_no_more():
    store, one = RecordStore(SECRETS), Publisher(1)
    one.store_at(store, 100.0)
    assert held(store, one.shared_key, 110.0) == [(one.peer_id, 10.0)]
    assert store.renew(one.peer_id, 1, one.keys, 120.0) == frozenset()
    assert held(store, one.shared_key, 120.0 + LIFE_S - 1) == [(one.peer_id, LIFE_S - 1)]
    assert held(store, one.shared_key, 120.0 + LIFE_S) == []
    assert store.renew(one.peer_id, 1, one.keys, 120.0 + LIFE_S) == one.keys
    assert len(store) == 1
    store.expire(120.0 + LIFE_S)
    assert (len(store), store.nbytes) == (0, 0)
    assert held(store, one.shared_key, 0.0) == []


def test_held_while_its_publisher_is_heard_and_now_and_then_renews_it():
    store, one = RecordStore(SECRETS), Publisher(1)
    assert not store.heard(one.peer_id, 0.0)
    one.store_at(store, 0.0)
    now = 0.0
    while now + 40.0 < limits.CAPABILITY_UNRENEWED_MAX_S:
        now += 40.0
        assert store.heard(one.peer_id, now)
        assert held(store, one.shared_key, now + 1.0) == [(one.peer_id, 1.0)]
    assert held(store, one.shared_key, limits.CAPABILITY_UNRENEWED_MAX_S) == []
    assert not store.heard(one.peer_id, limits.CAPABILITY_UNRENEWED_MAX_S)


def test_renewed_under_other_keys_it_is_held_under_these_alone():
    store, one = RecordStore(SECRETS), Publisher(1)
    label = "device 0 cpu"
    below = SECRETS.locate(label_below(label, bits_of(one.peer_id, 1)))
    store.store(one.signed(), [one.shared_key, below], 0.0, sender=one.peer_id, origin="/ip4/10.0.0.1")
    assert store.renew(one.peer_id, 1, [below], 1.0) == frozenset()
    assert (held(store, one.shared_key, 1.0), held(store, below, 1.0)) == ([], [(one.peer_id, 0.0)])
    # It is told which it is not held under, and forgotten where it is to be held no more.
    assert store.renew(one.peer_id, 1, [one.shared_key], 2.0) == {one.shared_key}
    assert (len(store), store.nbytes, held(store, below, 2.0)) == (0, 0, [])


def test_those_heard_of_last_come_first():
    store, some = RecordStore(SECRETS), [Publisher(n) for n in (1, 2, 3)]
    for number, one in enumerate(some):
        one.store_at(store, float(number))
    store.heard(some[0].peer_id, 9.0)
    assert [who for who, _ in held(store, some[0].shared_key, 10.0)] == [some[n].peer_id for n in (0, 2, 1)]


def test_the_newest_holds():
    store, one = RecordStore(SECRETS), Publisher(1)
    one.store_at(store, sequence=5)
    with pytest.raises(StaleRecordError, match=r"record 4 of .* is stale: number 5 is held") as raised:
        one.store_at(store, sequence=4)
    assert raised.value.held_sequence == 5
    # Another of the same number: it is sealed with other random bytes.
    with pytest.raises(StaleRecordError):
        one.store_at(store, sequence=5)
    one.store_at(store, 3.0, sequence=6)
    assert len(store) == 1
    assert store.renew(one.peer_id, 5, one.keys, 4.0) == one.keys


def test_the_same_record_is_held_under_more_keys():
    store, one = RecordStore(SECRETS), Publisher(1)
    record, (first, second) = one.signed(), sorted(one.keys)
    store.store(record, [first], 0.0, sender=one.peer_id, origin="x")
    assert store.renew(one.peer_id, 1, one.keys, 1.0) == {second}
    store.store(record, [second], 1.0, sender=one.peer_id, origin="x")
    assert store.renew(one.peer_id, 1, one.keys, 2.0) == frozenset()


def test_what_does_not_hold_is_refused_and_nothing_of_it_stays():
    store, one, other = RecordStore(SECRETS), Publisher(1), Publisher(2, kind="cuda")
    with pytest.raises(ProtocolError, match="everybody stores their own"):
        store.store(one.signed(), one.keys, 0.0, sender=other.peer_id, origin="x")
    forged = msgspec.structs.replace(one.signed(), sequence=9)
    with pytest.raises(AuthenticationError):
        store.store(forged, one.keys, 0.0, sender=one.peer_id, origin="x")
    with pytest.raises(ProtocolError, match="not its own"):
        store.store(one.signed(), other.keys, 0.0, sender=one.peer_id, origin="x")
    with pytest.raises(ProtocolError, match="under no key"):
        store.store(one.signed(), [], 0.0, sender=one.peer_id, origin="x")
    assert (len(store), store.nbytes) == (0, 0)


def test_who_withdraws_is_forgotten():
    store, one = RecordStore(SECRETS), Publisher(1)
    one.store_at(store)
    store.withdraw(one.peer_id)
    store.withdraw(one.peer_id)
    assert held(store, one.shared_key, 0.0) == []


def flood(store: RecordStore, count: int, *, first: int = 1000, now: float = 0.0, origin: str = "/ip4/6.6.6.6") -> int:
    stored = 0
    for number in range(first, first + count):
        try:
            Publisher(number).store_at(store, now, origin=origin)
        except ProtocolError:
            continue
        stored += 1
    return stored


@pytest.mark.parametrize(
    "bounds",
    [{"max_count": 12}, {"per_key_max_count": 12}, {"max_bytes": 12 * Publisher(1).signed().nbytes}],
)
def test_a_flood_from_one_address_displaces_nobody_else(bounds):
    store = RecordStore(SECRETS, **bounds)
    honest = [Publisher(n) for n in range(1, 7)]
    flood(store, 60)
    for number, one in enumerate(honest):
        one.store_at(store, origin=f"/ip4/10.0.0.{number}")
    flood(store, 60, first=5000)
    names = [who for who, _ in held(store, honest[0].shared_key, 1.0)]
    assert {one.peer_id for one in honest} <= set(names)
    assert len(store) == len(names) == 12


def test_who_made_way_is_told_once():
    store = RecordStore(SECRETS, per_key_max_count=2)
    for number in (1, 2):
        Publisher(number).store_at(store, origin="/ip4/10.0.0.1")
    Publisher(3).store_at(store, origin="/ip4/10.0.0.2")
    assert store.take_displaced() == [Publisher(1).peer_id]
    assert store.take_displaced() == []


def test_what_cannot_be_replaced_stays():
    store, one = RecordStore(SECRETS, per_origin_max_count=1), Publisher(1)
    one.store_at(store, origin="/ip4/10.0.0.1")
    Publisher(2).store_at(store, origin="/ip4/10.0.0.2")
    before = store.nbytes
    with pytest.raises(ProtocolError, match="1 records are held"):
        one.store_at(store, 5.0, sequence=2, origin="/ip4/10.0.0.2")
    assert [record.sequence for record, _ in store.get(one.shared_key, 5.0)].count(1) == 2
    assert store.nbytes == before


def test_one_address_has_so_many_and_no_more():
    store = RecordStore(SECRETS, per_origin_max_count=5)
    assert flood(store, 20) == 5
    with pytest.raises(ProtocolError, match=r"5 records are held for peers at /ip4/6\.6\.6\.6; no more are"):
        Publisher(1).store_at(store, origin="/ip4/6.6.6.6")
    Publisher(1).store_at(store, origin="/ip4/6.6.6.7")


def test_full_of_equals_takes_no_more_until_some_are_over():
    store = RecordStore(SECRETS, max_count=3)
    for number in (1, 2, 3):
        Publisher(number).store_at(store, origin=f"/ip4/10.0.0.{number}")
    last = Publisher(4)
    full = store.store(last.signed(), last.keys, 0.0, sender=last.peer_id, origin="/ip4/10.0.0.4")
    assert full == last.keys
    assert all(store.has_overflowed(key, 0.0) for key in last.keys)
    Publisher(4).store_at(store, LIFE_S, origin="/ip4/10.0.0.4")
    assert len(store) == 1


def test_one_that_is_larger_than_all_that_may_be_held_is_no_reason_to_spin():
    store = RecordStore(SECRETS, max_bytes=1)
    Publisher(1).store_at(store)
    with pytest.raises(ProtocolError, match="no room"):
        Publisher(2).store_at(store, origin="elsewhere")


def test_what_has_no_room_under_one_key_is_held_under_the_others_and_remembered():
    store = RecordStore(SECRETS, per_key_max_count=3)
    some = [Publisher(number) for number in range(1, 5)]
    key = some[0].shared_key
    for number, one in enumerate(some[:3]):
        store.store(one.signed(), [key], 0.0, sender=one.peer_id, origin=f"/ip4/10.0.0.{number}")
    assert not store.has_overflowed(key, 0.0)
    last, signed = some[3], some[3].signed()
    full = store.store(signed, last.keys, 5.0, sender=last.peer_id, origin="/ip4/10.0.0.9")
    assert full == {key}
    # It is a trainer, and found as such.
    assert store.renew(last.peer_id, 1, last.keys, 6.0) == {key}
    assert store.has_overflowed(key, 5.0 + limits.CAPABILITY_OVERFLOW_S - 1)
    assert not store.has_overflowed(key, 5.0 + limits.CAPABILITY_OVERFLOW_S)
    below = SECRETS.locate(label_below("device 0 cpu", bits_of(last.peer_id, 1)))
    assert store.store(signed, [below], 7.0, sender=last.peer_id, origin="/ip4/10.0.0.9") == frozenset()
    assert held(store, below, 7.0) == [(last.peer_id, 0.0)]
    # Nobody is held under nothing.
    other = Publisher(9)
    assert store.store(other.signed(), [key], 8.0, sender=other.peer_id, origin="/ip4/10.0.0.8") == {key}
    assert len(store) == 4
    store.expire(8.0 + limits.CAPABILITY_OVERFLOW_S)
    assert not store._overflowed_at
