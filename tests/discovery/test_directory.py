from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sparkle_mesh import limits
from sparkle_mesh.discovery.directory import (
    CACHE,
    EXCHANGE,
    GOSSIP,
    HOST,
    INTRODUCTION,
    JOIN,
    LAN,
    Dial,
    Directory,
    Hint,
)

ME = "M"
GRACE = limits.DISCOVERY_DIAL_GRACE_S
LOOPBACK = "/ip4/127.0.0.1/tcp/1"


def address(number: int, port: int = 1) -> str:
    return f"/ip4/10.0.{number // 256}.{number % 256}/tcp/{port}"


def hint(peer_id, *places, source=LAN, **more):
    return Hint(peer_id, places or (address(1),), source, **more)


@pytest.fixture
def directory(entropy):
    return Directory(ME, entropy=entropy)


def dialed(directory, now):
    return [dial.peer_id for dial in directory.due(now)]


# --- Whom to dial when ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [HOST, LAN])
def test_the_smaller_peer_dials_at_once_and_the_larger_after_a_grace(directory, source):
    assert directory.heard(hint("Z", source=source), 0.0)
    assert directory.heard(hint("A", source=source), 0.0)
    assert directory.next_wakeup(0.0) == 0.0
    assert dialed(directory, 0.0) == ["Z"]
    wakeup = directory.next_wakeup(0.0)
    assert GRACE <= wakeup <= 1.5 * GRACE
    assert dialed(directory, wakeup) == ["A"]


def test_the_larger_does_not_dial_if_the_other_came_in_time(directory):
    directory.heard(hint("A"), 0.0)
    directory.connected("A", 0.5)
    assert directory.next_wakeup(0.5) is None
    assert dialed(directory, 100.0) == []


@pytest.mark.parametrize("source", [JOIN, CACHE, EXCHANGE, GOSSIP, "something else"])
def test_what_perhaps_only_this_side_heard_is_dialed_at_once(directory, source):
    directory.heard(hint("A", source=source), 0.0)
    assert directory.next_wakeup(0.0) <= limits.DISCOVERY_DIAL_JITTER_S
    assert dialed(directory, limits.DISCOVERY_DIAL_JITTER_S) == ["A"]


def test_a_grace_ends_when_another_source_tells_the_same(directory):
    directory.heard(hint("A", source=LAN), 0.0)
    assert directory.heard(hint("A", source=JOIN), 0.1)
    assert directory.next_wakeup(0.1) == 0.1


def test_own_id_and_impossible_ones_are_ignored(directory):
    for peer_id in (ME, "", "two words", "x" * 1000):
        assert not directory.heard(hint(peer_id), 0.0)
        directory.refused(peer_id, 0.0)
        directory.connected(peer_id, 0.0)
    assert len(directory) == 0


def test_nothing_is_kept_of_a_peer_that_cannot_be_dialed(directory):
    assert not directory.heard(hint("A", "/ip4/10.0.0.1/udp/1/quic-v1"), 0.0)
    assert len(directory) == 0


def test_no_more_dials_at_once_than_allowed(entropy):
    directory = Directory("0", entropy=entropy, dials_max_count=6, dials_per_source_max_count=3)
    for number in range(10):
        directory.heard(hint(f"L{number}", source=LAN), 0.0)
        directory.heard(hint(f"E{number}", source=EXCHANGE), 0.0)
        directory.heard(hint(f"H{number}", source=HOST), 0.0)
    first = dialed(directory, 1.0)
    assert sorted(peer_id[0] for peer_id in first) == ["H"] * 3 + ["L"] * 3
    assert directory.next_wakeup(1.0) is None
    assert dialed(directory, 1.0) == []
    directory.dial_failed("L0", 2.0, "no")
    assert dialed(directory, 2.0) == ["L3"]


def test_a_source_that_fills_its_share_does_not_wake_anybody(entropy):
    directory = Directory("0", entropy=entropy, dials_max_count=4, dials_per_source_max_count=2)
    for number in range(10):
        directory.heard(hint(f"L{number}", source=LAN), 0.0)
    assert len(dialed(directory, 0.0)) == 2
    assert directory.next_wakeup(0.0) is None
    directory.heard(hint("J", source=JOIN), 0.0)
    assert directory.next_wakeup(0.0) == 0.0
    assert dialed(directory, 0.0) == ["J"]


def test_configured_peers_may_use_all_dials_and_come_first(entropy):
    directory = Directory("0", entropy=entropy, dials_max_count=4, dials_per_source_max_count=2)
    for number in range(6):
        directory.heard(hint(f"H{number}", source=HOST), 0.0)
        directory.heard(hint(f"J{number}", source=JOIN), 0.0)
    assert dialed(directory, 0.0) == ["J0", "J1", "J2", "J3"]


# --- Failures ---------------------------------------------------------------------------------------


def test_failures_back_off_exponentially_with_jitter_up_to_a_bound(directory):
    directory.heard(hint("Z"), 0.0)
    now, delays = 0.0, []
    for _ in range(12):
        assert dialed(directory, now) == ["Z"]
        directory.dial_failed("Z", now, "refused")
        wakeup = directory.next_wakeup(now)
        assert dialed(directory, wakeup - 0.01) == []
        delays.append(wakeup - now)
        now = wakeup
    for count, delay in enumerate(delays):
        middle = min(limits.DISCOVERY_BACKOFF_MAX_S, limits.DISCOVERY_BACKOFF_MIN_S * 2**count)
        assert 0.75 * middle <= delay <= 1.25 * middle
    assert directory.get("Z").last_error == "refused"


def test_configured_peers_are_tried_more_often_and_never_forgotten(directory):
    directory.heard(hint("Z", source=JOIN), 0.0)
    now = 0.0
    for _ in range(200):
        assert dialed(directory, now) == ["Z"]
        directory.dial_failed("Z", now, "refused")
        wakeup = directory.next_wakeup(now)
        assert wakeup - now <= 1.25 * limits.DISCOVERY_CONFIGURED_BACKOFF_MAX_S
        now = wakeup
    assert now > limits.DISCOVERY_FORGET_S


def test_a_peer_that_fails_and_is_not_heard_of_any_more_is_forgotten(directory):
    directory.heard(hint("Z"), 0.0)
    now = 0.0
    while directory.get("Z") is not None:
        if dialed(directory, now):
            directory.dial_failed("Z", now, "refused")
        now = directory.next_wakeup(now) or now + 1
        assert now < 2 * limits.DISCOVERY_FORGET_S
    assert now > limits.DISCOVERY_FORGET_S


def test_a_cached_peer_that_is_not_there_is_soon_forgotten(directory):
    directory.heard(hint("Z", source=CACHE), 0.0)
    for now in range(1, 1 + limits.DISCOVERY_CACHED_FAILURES_COUNT):
        assert dialed(directory, now * 10.0) == ["Z"]
        directory.dial_failed("Z", now * 10.0, "refused")
    assert dialed(directory, 1000.0) == []
    assert directory.get("Z") is None


def test_a_refused_peer_is_left_alone_for_long_whatever_is_heard(directory):
    directory.heard(hint("Z"), 0.0)
    directory.due(0.0)
    directory.dial_succeeded("Z", 0.0)
    directory.refused("Z", 0.1, "another mesh")
    directory.disconnected("Z", 1.0)
    assert directory.get("Z").last_error == "another mesh"
    assert not directory.heard(hint("Z", source=GOSSIP, fresh=True), 2.0)
    first = directory.next_wakeup(2.0)
    assert 0.75 * limits.DISCOVERY_REFUSED_BACKOFF_MIN_S <= first - 0.1 <= 1.25 * limits.DISCOVERY_REFUSED_BACKOFF_MIN_S
    for _ in range(10):
        assert dialed(directory, first) == ["Z"]
        directory.dial_succeeded("Z", first)
        directory.refused("Z", first)
        directory.disconnected("Z", first)
        now, first = first, directory.next_wakeup(first)
    assert first - now >= 0.75 * limits.DISCOVERY_REFUSED_BACKOFF_MAX_S


def test_an_admitted_peer_is_no_longer_refused(directory):
    directory.heard(hint("Z"), 0.0)
    directory.connected("Z", 0.0)
    directory.refused("Z", 0.0)
    directory.heard(hint("Z", source=INTRODUCTION), 20.0)
    directory.disconnected("Z", 30.0)
    assert directory.next_wakeup(30.0) < 31.0


def test_refusals_are_remembered_of_peers_that_came_by_themselves(directory):
    directory.connected("Z", 0.0)
    directory.refused("Z", 0.0)
    directory.disconnected("Z", 1.0)
    directory.heard(hint("Z"), 2.0)
    assert directory.next_wakeup(2.0) > 10.0
    directory.refused("Y", 0.0)
    assert directory.get("Y").refusals == 1


def test_a_peer_without_addresses_is_dropped_when_it_goes(directory):
    directory.connected("Z", 0.0)
    directory.disconnected("Z", 1.0)
    directory.disconnected("Z", 1.0)
    directory.dial_failed("Z", 1.0, "late")
    assert len(directory) == 0


def test_a_peer_that_just_started_again_is_dialed_soon(directory):
    directory.heard(hint("Z"), 0.0)
    now = 0.0
    for _ in range(8):
        directory.due(now)
        directory.dial_failed("Z", now, "refused")
        failed_at, now = now, directory.next_wakeup(now)
    assert not directory.heard(hint("Z"), failed_at + 0.5)
    assert directory.next_wakeup(failed_at) == now
    assert directory.heard(hint("Z", fresh=True), failed_at + 0.5)
    assert directory.next_wakeup(failed_at) == failed_at + limits.DISCOVERY_FRESH_RETRY_S
    assert not directory.heard(hint("Z", fresh=True), failed_at + 0.6)


def test_a_lost_connection_is_dialed_again_and_one_that_never_lasts_less_and_less(directory):
    directory.heard(hint("Z"), 0.0)
    directory.connected("Z", 0.0)
    directory.disconnected("Z", 100.0)
    assert 100.4 < directory.next_wakeup(100.0) < 101.1
    now = 101.0
    for _ in range(7):
        directory.due(now)
        directory.dial_succeeded("Z", now)
        directory.disconnected("Z", now + 0.1)
        ended_at, now = now + 0.1, directory.next_wakeup(now)
    assert now - ended_at > 20.0


def test_a_failed_dial_means_nothing_if_the_peer_came_meanwhile(directory):
    directory.heard(hint("Z"), 0.0)
    assert dialed(directory, 0.0) == ["Z"]
    directory.connected("Z", 0.1)
    directory.connected("Z", 0.2)
    directory.dial_failed("Z", 0.3, "refused")
    assert directory.get("Z").connected_at == 0.1
    assert directory.get("Z").failures == 0
    assert not directory.get("Z").dialing


# --- Addresses --------------------------------------------------------------------------------------


def test_what_worked_is_tried_first_until_it_fails(directory):
    directory.heard(hint("Z", address(1), address(2), address(3)), 0.0)
    directory.due(0.0)
    directory.dial_succeeded("Z", 0.0, remote_address=address(3))
    directory.disconnected("Z", 10.0)
    (dial,) = directory.due(20.0)
    assert dial == Dial("Z", (address(3), address(1), address(2)))
    directory.dial_failed("Z", 21.0, "refused")
    directory.heard(hint("Z", address(4), source=HOST), 21.0)
    (dial,) = directory.due(100.0)
    assert dial.addresses[0] == address(4)


def test_where_a_peer_came_from_is_no_address_to_dial(directory):
    directory.connected("Z", 0.0, remote_address="/ip4/10.0.0.1/tcp/50123")
    assert directory.get("Z").dial_addresses() == ()


def test_loopback_is_tried_first_on_this_host_and_not_at_all_on_others(directory):
    directory.heard(hint("Z", address(1), LOOPBACK), 0.0)
    assert directory.get("Z").dial_addresses() == (address(1),)
    directory.heard(hint("Z", address(1), LOOPBACK, source=HOST, same_host=True), 0.0)
    assert directory.get("Z").dial_addresses() == (LOOPBACK, address(1))
    directory.heard(hint("Y", address(1), LOOPBACK), 0.0)
    directory.connected("Y", 0.0, remote_address="/ip4/127.0.0.1/tcp/50123")
    assert directory.get("Y").dial_addresses()[0] == LOOPBACK
    directory.heard(hint("X", LOOPBACK, source=EXCHANGE), 0.0)
    assert directory.get("X").dial_addresses() == (LOOPBACK,)


def test_what_a_peer_itself_tells_replaces_what_it_told(directory):
    directory.heard(hint("Z", address(9), source=EXCHANGE), 0.0)
    directory.heard(hint("Z", address(1), address(2)), 0.0)
    directory.heard(hint("Z", address(2), address(3)), 1.0)
    assert set(directory.get("Z").dial_addresses()) == {address(9), address(2), address(3)}


def test_addresses_of_a_peer_are_bounded_and_the_trusted_and_working_stay(directory):
    directory.heard(hint("Z", address(1), source=JOIN), 0.0)
    directory.heard(hint("Z", address(2)), 0.0)
    directory.connected("Z", 0.0, remote_address=address(2))
    for number in range(10, 200):
        directory.heard(hint("Z", address(number), source=EXCHANGE), float(number))
    places = directory.get("Z").dial_addresses()
    assert len(places) == limits.ADDRESSES_PER_PEER_MAX_COUNT
    assert places[:2] == (address(2), address(1))
    assert address(199) in places


# --- The bound of the table -------------------------------------------------------------------------


def test_a_flood_from_one_source_displaces_only_its_own(entropy):
    directory = Directory("0", entropy=entropy, contacts_max_count=64)
    for number in range(10):
        directory.heard(hint(f"H{number}", source=HOST), 0.0)
        directory.heard(hint(f"G{number}", source=GOSSIP), 0.0)
    directory.heard(hint("J", source=JOIN), 0.0)
    for number in range(1000):
        directory.heard(hint(f"L{number}", source=LAN), 1.0 + number)
    kept = [contact.peer_id for contact in directory.contacts()]
    assert 60 < len(kept) <= 64
    assert len([peer_id for peer_id in kept if peer_id[0] in "HGJ"]) == 21
    assert "L999" in kept


def test_a_table_full_of_one_source_has_room_for_others(entropy):
    directory = Directory("0", entropy=entropy, contacts_max_count=64)
    for number in range(1000):
        directory.heard(hint(f"L{number}", source=LAN), float(number))
    for number in range(40):
        directory.heard(hint(f"H{number}", source=HOST), 2000.0)
    kept = [contact.source for contact in directory.contacts()]
    # Up to equal shares; beyond, a source displaces its own.
    assert 60 < len(kept) <= 64
    assert abs(kept.count(HOST) - kept.count(LAN)) <= 4


def test_connected_and_configured_peers_are_never_displaced(entropy):
    directory = Directory("0", entropy=entropy, contacts_max_count=8)
    for number in range(4):
        directory.heard(hint(f"J{number}", source=JOIN), 0.0)
        directory.connected(f"C{number}", 0.0)
    assert not directory.heard(hint("Z"), 1.0)
    directory.connected("Y", 1.0)
    directory.refused("Y", 1.0)
    assert len(directory) == 8
    directory.disconnected("C0", 2.0)
    assert directory.heard(hint("Z"), 2.0)


# --- Anything, in any order -------------------------------------------------------------------------

PEERS = [f"P{number}" for number in range(24)] + [ME]
SOURCES = [JOIN, HOST, INTRODUCTION, GOSSIP, LAN, CACHE, EXCHANGE, "rumour"]


class RandomEntropy:
    def __init__(self) -> None:
        self._random = random.Random(0)

    def token(self, nbytes):
        return self._random.randbytes(nbytes)

    def uniform(self, low, high):
        return self._random.uniform(low, high)


class DirectoryMachine(RuleBasedStateMachine):
    """A caller that keeps the rules, and a world that does anything."""

    @initialize()
    def start(self):
        self.directory = Directory(
            ME, entropy=RandomEntropy(), contacts_max_count=12, dials_max_count=4, dials_per_source_max_count=2
        )
        self.now = 0.0
        self.dialing = set()
        self.connected = set()
        self.configured = set()

    @rule(
        peer_id=st.sampled_from(PEERS),
        numbers=st.lists(st.integers(0, 40), max_size=20),
        source=st.sampled_from(SOURCES),
        same_host=st.booleans(),
        fresh=st.booleans(),
    )
    def hear(self, peer_id, numbers, source, same_host, fresh):
        places = tuple(address(number) if number else LOOPBACK for number in numbers)
        self.directory.heard(Hint(peer_id, places, source, same_host, fresh), self.now)
        if source == JOIN and self.directory.get(peer_id) is not None:
            self.configured.add(peer_id)

    @rule(peer_id=st.sampled_from(PEERS), number=st.none() | st.integers(0, 40))
    def connect(self, peer_id, number):
        self.directory.connected(peer_id, self.now, remote_address=None if number is None else address(number))
        if self.directory.get(peer_id) is not None:
            self.connected.add(peer_id)

    @rule(peer_id=st.sampled_from(PEERS))
    def disconnect(self, peer_id):
        self.directory.disconnected(peer_id, self.now)
        self.connected.discard(peer_id)

    @rule(peer_id=st.sampled_from(PEERS))
    def refuse(self, peer_id):
        self.directory.refused(peer_id, self.now)

    @rule()
    def dial(self):
        for dial in self.directory.due(self.now):
            assert dial.peer_id != ME
            assert dial.addresses
            assert dial.peer_id not in self.dialing | self.connected
            self.dialing.add(dial.peer_id)
        assert len(self.dialing) <= 4

    @rule(choice=st.randoms(use_true_random=False), success=st.booleans())
    def end_a_dial(self, choice, success):
        if self.dialing:
            peer_id = choice.choice(sorted(self.dialing))
            self.dialing.discard(peer_id)
            if success:
                self.directory.dial_succeeded(peer_id, self.now, remote_address=address(1))
                self.connected.add(peer_id)
            else:
                self.directory.dial_failed(peer_id, self.now, "no")

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.5, 3.0, 20.0, 300.0, 2000.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def wait_for_the_wakeup(self):
        wakeup = self.directory.next_wakeup(self.now)
        if wakeup is not None:
            assert wakeup >= self.now
            self.now = wakeup
            due = self.directory.due(self.now)
            assert due or wakeup_was_for_the_forgotten(self.directory, self.now)
            self.dialing.update(dial.peer_id for dial in due)

    @invariant()
    def bounds_hold_and_nobody_important_is_lost(self):
        contacts = {contact.peer_id: contact for contact in self.directory.contacts()}
        assert len(contacts) <= 12
        assert ME not in contacts
        assert self.connected == {peer_id for peer_id, contact in contacts.items() if contact.connected}
        assert self.configured <= contacts.keys()
        assert self.dialing == {peer_id for peer_id, contact in contacts.items() if contact.dialing}
        for contact in contacts.values():
            assert len(contact.places) <= limits.ADDRESSES_PER_PEER_MAX_COUNT
            assert set(contact.dial_addresses()) <= contact.places.keys()
            assert bool(contact.dial_addresses()) == bool(contact.places)

    @invariant()
    def nobody_is_left_waiting_for_ever(self):
        if len(self.dialing) == 0 and any(contact.waiting for contact in self.directory.contacts()):
            assert self.directory.next_wakeup(self.now) is not None
        if all(contact.idle and contact.places for contact in self.directory.contacts()):
            assert all(contact.due_at is not None for contact in self.directory.contacts())


def wakeup_was_for_the_forgotten(directory, now):
    """Whoever was due is no longer in the table, so the next wake-up is later."""
    wakeup = directory.next_wakeup(now)
    return wakeup is None or wakeup > now


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
