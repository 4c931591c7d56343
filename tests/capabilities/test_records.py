"""Signed and sealed records, and where they belong."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.labels import (
    MEMORY_RANGES_COUNT,
    TRAINERS_LABEL,
    bits_of,
    device_label,
    index_labels,
    label_below,
    memory_range,
)
from sparkle_mesh.capabilities.records import (
    CapabilityRecord,
    SignedRecord,
    index_keys,
    open_filed,
    open_record,
    sign_record,
)
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import AuthenticationError, ProtocolError, UsageError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.keys import MeshKey, MeshSecrets

GIB = 1 << 30
IDENTITY = Identity(b"\x01" * 32)
SECRETS = MeshSecrets("a mesh", None)
DEVICE = DeviceInfo(kind="cuda", index=0, name="a GPU", memory_bytes=24 * GIB)
RECORD = CapabilityRecord(
    host_id=b"h" * 16, role="trainer", software="sparkle-mesh 1", addresses=("/ip4/10.0.0.1/tcp/1",), devices=(DEVICE,)
)


def signed(sequence: int = 7, record: CapabilityRecord = RECORD, secrets: MeshSecrets = SECRETS) -> SignedRecord:
    return sign_record(record, IDENTITY, secrets, sequence=sequence)


def test_what_is_signed_is_read_by_the_mesh_and_by_nobody_else():
    assert open_record(signed(), SECRETS) == RECORD
    assert b"a GPU" not in wire.encode(signed())
    for other in (MeshSecrets("another", None), MeshSecrets("a mesh", MeshKey.generate())):
        with pytest.raises(AuthenticationError, match="not signed by it"):
            open_record(signed(), other)


@pytest.mark.parametrize(
    "change",
    [
        {"publisher": Identity(b"\x02" * 32).peer_id},
        {"publisher": "nobody"},
        {"sequence": 8},
        {"lifetime_s": 600.0},
        {"sealed": b"x" * 60},
        {"signature": b"\0" * 64},
    ],
)
def test_whatever_is_changed_is_noticed(change):
    with pytest.raises(AuthenticationError):
        open_record(msgspec.structs.replace(signed(), **change), SECRETS)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(place, bit):
    data = bytearray(wire.encode(signed()))
    data[place % len(data)] ^= 1 << bit
    try:
        forged = wire.decode(bytes(data), SignedRecord)
    except ProtocolError:
        return
    if forged != signed() and forged.publisher:
        with pytest.raises((AuthenticationError, ProtocolError)):
            assert open_record(forged, SECRETS) != RECORD


def test_too_much_to_tell_is_told_to_the_caller():
    many = tuple(
        DeviceInfo(kind="cuda", index=n, name="x" * limits.NAME_MAX_CHARS, memory_bytes=GIB)
        for n in range(limits.DEVICES_PER_RECORD_MAX_COUNT)
    )
    with pytest.raises(UsageError, match=r"takes \d+ bytes, over the limit of 8192; it has 32 devices"):
        signed(record=msgspec.structs.replace(RECORD, devices=many))


def test_a_record_belongs_under_its_own_keys_alone():
    keys = index_keys(IDENTITY.peer_id, RECORD, SECRETS)
    # Two labels, and for each one below for each bit of the publisher's hash.
    assert len(keys) == 2 * (1 + limits.CAPABILITY_DEPTH_MAX_COUNT)
    for some in (keys, [next(iter(keys))], []):
        assert open_filed(signed(), some, SECRETS) == RECORD
    with pytest.raises(ProtocolError, match="filed under 1 keys that are not its own"):
        open_filed(signed(), [*keys, SECRETS.locate("device 3 cpu")], SECRETS)
    bits = bits_of(IDENTITY.peer_id, 3)
    below = [SECRETS.locate(label_below(label, bits)) for label in index_labels(RECORD.role, RECORD.devices)]
    assert open_filed(signed(), below, SECRETS) == RECORD
    other = bits[:-1] + ("1" if bits[-1] == "0" else "0")
    elsewhere = [SECRETS.locate(label_below(label, other)) for label in index_labels(RECORD.role, RECORD.devices)]
    with pytest.raises(ProtocolError, match="not its own"):
        open_filed(signed(), elsewhere[:1], SECRETS)
    # Places tell nobody without the key what is there.
    assert not keys & index_keys(IDENTITY.peer_id, RECORD, MeshSecrets("a mesh", MeshKey.generate()))


@pytest.mark.parametrize(
    ("gib", "number"),
    [
        (0, 0),
        (0.99, 0),
        (1, 1),
        (3.9, 1),
        (4, 2),
        (15.9, 2),
        (16, 3),
        (64, 4),
        (256, 5),
        (1024, 6),
        (4096, 7),
        (1e6, 7),
    ],
)
def test_ranges_of_memory(gib, number):
    assert memory_range(int(gib * GIB)) == number < MEMORY_RANGES_COUNT


@given(one=st.integers(0, 2**50), other=st.integers(0, 2**50))
def test_more_memory_is_never_in_a_lower_range(one, other):
    assert memory_range(min(one, other)) <= memory_range(max(one, other))
    assert memory_range(-1) == 0


def test_labels():
    assert index_labels("node", [DEVICE, DEVICE]) == {device_label("cuda", 3)}
    assert index_labels("trainer", []) == {TRAINERS_LABEL}
