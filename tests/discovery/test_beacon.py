from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.discovery.beacon import (
    MAGIC,
    VERSION,
    Beacon,
    BeaconMachine,
    TokenBucket,
    addresses_to_tell,
    decode_beacon,
    encode_beacon,
    hint_of,
)
from sparkle_mesh.errors import ProtocolError, VersionError

TAG = b"t" * 32
HERE = "/ip4/127.0.0.1/tcp/7"
LAN = "/ip4/192.168.1.4/tcp/7"
OTHER_LAN = "/ip4/10.0.0.4/tcp/7"

# From version 1 on this datagram keeps decoding.
GOLDEN = bytes.fromhex(
    "73706b6c"  # magic
    "86"  # six fields
    "a776657273696f6e01"
    "a86d6573685f746167c420" + "74" * 32 + "a7706565725f6964a350 6565".replace(" ", "") + "a9616464726573736573"
    "91b42f6970342f3132372e302e302e312f7463702f37a4706f727407ac77616e74735f616e73776572c3"
)


def beacon(peer_id="P", addresses=(LAN,), port=7, **more):
    return Beacon(
        **{"version": VERSION, "mesh_tag": TAG, "peer_id": peer_id, "addresses": addresses, "port": port, **more}
    )


def test_golden_datagram():
    expected = beacon("Pee", (HERE,), wants_answer=True)
    assert decode_beacon(GOLDEN) == expected
    assert encode_beacon(expected) == GOLDEN


def test_later_fields_are_ignored_and_later_versions_refused():
    fields = msgspec.msgpack.decode(GOLDEN[len(MAGIC) :])
    assert decode_beacon(MAGIC + msgspec.msgpack.encode({**fields, "more": [1]})).peer_id == "Pee"
    with pytest.raises(VersionError, match="version 2"):
        decode_beacon(MAGIC + msgspec.msgpack.encode({**fields, "version": 2, "mesh_tag": 5}))


@pytest.mark.parametrize(
    "change",
    [
        {"mesh_tag": b"short"},
        {"peer_id": ""},
        {"peer_id": "x" * (limits.PEER_ID_MAX_CHARS + 1)},
        {"port": 65536},
        {"port": -1},
        {"addresses": ["/a"] * (limits.ADDRESSES_PER_PEER_MAX_COUNT + 1)},
        {"addresses": "text"},
        {"version": -1},
        {"wants_answer": 1},
    ],
)
def test_fields_out_of_bounds_are_refused(change):
    fields = msgspec.msgpack.decode(GOLDEN[len(MAGIC) :])
    with pytest.raises(ProtocolError):
        decode_beacon(MAGIC + msgspec.msgpack.encode({**fields, **change}))


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda data: MAGIC + data))
def test_garbage_is_refused(data):
    with pytest.raises(ProtocolError):
        decode_beacon(data)


@given(st.integers(0, len(GOLDEN) - 1), st.integers(1, 255))
def test_damaged_datagrams_decode_or_are_refused(position, flip):
    damaged = bytearray(GOLDEN)
    damaged[position] ^= flip
    with suppress(ProtocolError):
        assert isinstance(decode_beacon(bytes(damaged)), Beacon)
    with pytest.raises(ProtocolError):
        decode_beacon(GOLDEN[:position])


def test_oversize_is_refused():
    padded = MAGIC + msgspec.msgpack.encode({"version": 1, "padding": "x" * limits.BEACON_MAX_BYTES})
    with pytest.raises(ProtocolError, match="over the limit"):
        decode_beacon(padded)


def test_addresses_that_do_not_fit_are_left_out():
    long = [f"/dns4/{'a' * 60}.{'b' * 60}.{number}/tcp/7" for number in range(limits.ADDRESSES_PER_PEER_MAX_COUNT)]
    datagram = encode_beacon(beacon(addresses=tuple(long)))
    assert len(datagram) <= limits.BEACON_MAX_BYTES
    told = decode_beacon(datagram).addresses
    assert 1 < len(told) < len(long)
    assert list(told) == long[: len(told)]


def test_loopback_is_told_on_the_loopback_interface_alone():
    assert addresses_to_tell((LAN, HERE), "127.0.0.1") == (HERE, LAN)
    assert addresses_to_tell((OTHER_LAN, LAN, HERE), "192.168.1.4") == (LAN, OTHER_LAN)
    assert addresses_to_tell((HERE,), "192.168.1.4") == ()


# --- What a beacon tells ----------------------------------------------------------------------------


def test_the_address_of_the_sender_comes_first():
    hint = hint_of(beacon(addresses=(OTHER_LAN, LAN)), "192.168.1.4", same_host=False)
    assert hint.addresses == (LAN, OTHER_LAN)
    assert not hint.same_host
    assert not hint.fresh


def test_the_address_of_a_sender_that_does_not_know_it_is_added():
    hint = hint_of(beacon(addresses=(LAN,), wants_answer=True), "10.9.9.9", same_host=False)
    assert hint.addresses == ("/ip4/10.9.9.9/tcp/7", LAN)
    assert hint.fresh


def test_the_address_of_the_sender_is_not_added_with_a_port_it_does_not_tell_of():
    assert hint_of(beacon(addresses=(LAN,), port=8), "10.9.9.9", same_host=False).addresses == (LAN,)


def test_loopback_of_another_host_is_worth_nothing():
    assert hint_of(beacon(addresses=(HERE,)), "10.9.9.9", same_host=False) is None
    assert hint_of(beacon(addresses=()), "10.9.9.9", same_host=False) is None
    assert hint_of(beacon(addresses=(HERE, LAN)), "192.168.1.4", same_host=False).addresses == (LAN,)


def test_loopback_of_this_host_is_kept():
    hint = hint_of(beacon(addresses=(HERE,)), "127.0.0.1", same_host=True)
    assert hint.addresses == (HERE,)
    assert hint.same_host
    assert hint_of(beacon(addresses=(LAN,)), "127.0.0.1", same_host=True).addresses == (LAN,)


# --- When beacons go out ----------------------------------------------------------------------------


@pytest.fixture
def machine(entropy):
    return BeaconMachine("me", TAG, entropy=entropy, now=0.0)


def run_until(machine, end):
    """Return when the machine sends before ``end``, and whether it asks."""
    sent = []
    while machine.next_wakeup() < end:
        now = machine.next_wakeup()
        asks = machine.due(now)
        if asks is not None:
            sent.append((now, asks))
    return sent


def ask(machine, peer_id, now, **more):
    return machine.received(
        encode_beacon(beacon(peer_id, wants_answer=True)), "192.168.1.4", now, same_host=False, **more
    )


def test_a_newcomer_asks_a_few_times_and_then_tells_rarely(machine):
    sent = run_until(machine, 61.0)
    questions = [now for now, asks in sent if asks]
    assert len(questions) == len(limits.BEACON_START_TIMES_S)
    assert questions[0] <= limits.BEACON_START_JITTER_S
    assert questions[-1] < 2.0
    assert 4 <= len(sent) - len(questions) <= 8
    assert all(not asks for now, asks in sent if now > 2.0)


def test_nothing_is_due_before_its_time(machine):
    run_until(machine, 2.0)
    assert machine.due(2.5) is None


def test_a_question_is_answered_once_and_soon(machine):
    run_until(machine, 3.0)
    assert ask(machine, "P", 3.0).peer_id == "P"
    answer_at = machine.next_wakeup()
    assert 3.0 + limits.BEACON_ANSWER_DELAY_MIN_S <= answer_at <= 3.0 + limits.BEACON_ANSWER_DELAY_MAX_S
    ask(machine, "P", 3.001)
    ask(machine, "Q", 3.002)
    assert machine.next_wakeup() == answer_at
    assert machine.due(answer_at) is False
    for repeated in (3.1, 3.4, 4.5):
        ask(machine, "P", repeated)
        assert machine.next_wakeup() > 5.0
    ask(machine, "R", 4.6)
    assert machine.next_wakeup() < 4.7


def test_a_peer_that_comes_back_later_is_answered_again(machine):
    run_until(machine, 3.0)
    ask(machine, "P", 3.0)
    machine.due(machine.next_wakeup())
    later = 3.0 + limits.BEACON_NEWCOMER_S + 0.1
    ask(machine, "P", later)
    assert machine.next_wakeup() <= later + limits.BEACON_ANSWER_DELAY_MAX_S


def test_telling_is_not_answered(machine):
    run_until(machine, 3.0)
    before = machine.next_wakeup()
    assert machine.received(encode_beacon(beacon("P")), "192.168.1.4", 3.0, same_host=False) is not None
    assert machine.next_wakeup() == before


def test_own_beacons_other_meshes_and_garbage_are_ignored(machine):
    run_until(machine, 3.0)
    before = machine.next_wakeup()
    assert ask(machine, "me", 3.0) is None
    other = msgspec.structs.replace(beacon("P", wants_answer=True), mesh_tag=b"u" * 32)
    assert machine.received(encode_beacon(other), "192.168.1.4", 3.0, same_host=False) is None
    assert machine.received(b"GET / HTTP/1.1", "192.168.1.4", 3.0, same_host=False) is None
    assert machine.next_wakeup() == before
    assert (machine.heard_count, machine.ignored_count, machine.dropped_count) == (0, 2, 0)


def test_a_host_that_floods_is_cut_and_others_are_heard(machine):
    flood = limits.BEACONS_PER_HOST_BURST_COUNT + 100
    for number in range(flood):
        ask(machine, f"P{number}", 3.0)
    assert machine.dropped_count == 100
    datagram = encode_beacon(beacon("Q"))
    assert machine.received(datagram, "192.168.1.5", 3.0, same_host=False) is not None
    assert machine.received(datagram, "192.168.1.4", 4.0, same_host=False) is not None


def test_many_hosts_that_flood_are_cut_all_together(machine):
    for number in range(limits.BEACONS_BURST_COUNT + 10):
        machine.received(b"x", f"10.0.{number // 256}.{number % 256}", 3.0, same_host=False)
    assert machine.dropped_count == 10
    assert len(machine._hosts) == limits.BEACON_HOSTS_MAX_COUNT


def test_newcomers_remembered_are_bounded(machine):
    for number in range(limits.BEACON_NEWCOMERS_MAX_COUNT + 50):
        ask(machine, f"P{number}", 3.0 + number)
    assert len(machine._newcomers) == limits.BEACON_NEWCOMERS_MAX_COUNT


def test_bucket_fills_again_up_to_its_burst():
    bucket = TokenBucket.full(2, 1.0, 0.0)
    assert [bucket.take(0.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(1.0) for _ in range(2)] == [True, False]
    assert [bucket.take(100.0) for _ in range(3)] == [True, True, False]
