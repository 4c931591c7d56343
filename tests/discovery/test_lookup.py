"""Lookups: that they find the closest, whoever is silent, dead or lies."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.discovery.lookup import Lookup
from sparkle_mesh.discovery.routing_table import distance, key_of_peer
from sparkle_mesh.wire import PeerAddress

ME = "12D3KooWMe"
COUNT = limits.CAPABILITY_HOLDERS_COUNT
KEY = b"\x17" * 32


def named(*names: str) -> list[PeerAddress]:
    return [PeerAddress(name, ("/ip4/10.0.0.1/tcp/1",)) for name in names]


def closest_of(names, count: int = COUNT) -> list[str]:
    return sorted(names, key=lambda name: distance(KEY, key_of_peer(name)))[:count]


def run(lookup: Lookup, knows, *, silent=(), dead=(), answer_s: float = 0.05, start: float = 0.0):
    """Answer what the lookup asks as a network would; return the time that it took and who was asked."""
    now, flying, asked = start, [], []
    while not lookup.is_over(now):
        for peer in lookup.due(now):
            asked.append(peer.peer_id)
            if peer.peer_id in dead:
                flying.append((now + limits.KAD_QUESTION_TIMEOUT_S, peer.peer_id))
            elif peer.peer_id not in silent:
                flying.append((now + answer_s, peer.peer_id))
        flying.sort()
        wakeup = lookup.next_wakeup(now)
        if flying and flying[0][0] <= wakeup:
            now, name = flying.pop(0)
            if name in dead:
                lookup.failed(name)
            else:
                lookup.answered(name, named(*knows(name)))
        else:
            assert wakeup > now, "it would spin"
            now = wakeup
    return now - start, asked


@given(seed=st.integers(0, 2**32), size=st.integers(1, 120))
def test_the_closest_of_all_are_found_from_any_start(seed, size):
    chooser = random.Random(seed)
    names = [f"peer{n}" for n in range(size)]

    def knows(name: str) -> list[str]:
        # As tables do: those nearest to the key of those one knows, who are many nearby and some far away.
        near = sorted(names, key=lambda other: distance(key_of_peer(name), key_of_peer(other)))[1:21]
        return closest_of({*near, *chooser.sample(names, min(size, 10))})

    start = chooser.sample(names, min(size, 3))
    lookup = Lookup(KEY, ME, named(*start), now=0.0)
    took_s, asked = run(lookup, knows)
    assert len(asked) == len(set(asked)) <= limits.LOOKUP_PEERS_MAX_COUNT
    assert [peer.peer_id for peer in lookup.closest()] == closest_of(names)
    assert took_s < limits.LOOKUP_TIMEOUT_S


def test_nobody_to_ask_is_over_at_once():
    lookup = Lookup(KEY, ME, named(ME), now=5.0)
    assert lookup.is_over(5.0)
    assert lookup.due(5.0) == []
    assert lookup.closest() == []


def test_silent_peers_cost_a_moment_and_dead_ones_are_left_out():
    names = [f"peer{n}" for n in range(40)]
    in_order = closest_of(names, 40)
    silent, dead = set(in_order[0:6:2]), set(in_order[1:6:2])
    lookup = Lookup(KEY, ME, named(*names), now=0.0)
    took_s, _ = run(lookup, lambda name: closest_of(names), silent=silent, dead=dead)
    assert took_s < 1.0
    assert [peer.peer_id for peer in lookup.closest()] == [n for n in in_order if n not in silent | dead][:COUNT]


def test_where_all_are_slow_they_are_waited_for():
    names = [f"peer{n}" for n in range(5)]
    lookup = Lookup(KEY, ME, named(*names), now=0.0)
    took_s, _ = run(lookup, lambda name: names, answer_s=3 * limits.LOOKUP_PATIENCE_S)
    assert {peer.peer_id for peer in lookup.closest()} == set(names)
    assert took_s < 5 * limits.LOOKUP_PATIENCE_S


def test_the_deadline_ends_it():
    lookup = Lookup(KEY, ME, named("a", "b"), now=10.0, timeout_s=2.0)
    took_s, _ = run(lookup, lambda name: [], silent={"a", "b"}, start=10.0)
    assert took_s == 2.0
    assert lookup.due(12.0) == []
    assert lookup.closest() == []


def test_one_that_names_peers_it_made_up_costs_little():
    """Each of those that were made up leads to more of them: they are all closer, and none is there."""
    made_up = iter(range(10**6))

    def knows(name: str) -> list[str]:
        return [f"ghost{next(made_up)}" for _ in range(1000)]

    names = [f"peer{n}" for n in range(20)]
    lookup = Lookup(KEY, ME, named(*names), now=0.0)
    took_s, asked = run(lookup, lambda name: knows(name) if name in ("peer3", "peer7") else names)
    assert len(asked) <= limits.LOOKUP_PEERS_MAX_COUNT
    assert took_s <= limits.LOOKUP_TIMEOUT_S


def test_a_crowd_of_one_network_is_few_of_the_closest():
    crowd = [PeerAddress(f"sybil{n}", (f"/ip4/8.8.4.{n}/tcp/1",)) for n in range(200)]
    others = [PeerAddress(f"peer{n}", (f"/ip4/9.9.{n}.1/tcp/1",)) for n in range(20)]
    lookup = Lookup(KEY, ME, [*crowd[:16], *others], now=0.0)
    peers = {peer.peer_id: peer for peer in (*crowd, *others)}

    def knows(name: str) -> list[str]:
        return closest_of([peer.peer_id for peer in (crowd if name.startswith("sybil") else others)], 16)

    now = 0.0
    while not lookup.is_over(now):
        for peer in lookup.due(now):
            lookup.answered(peer.peer_id, [peers[name] for name in knows(peer.peer_id)])
        now += 0.01
    closest = [peer.peer_id for peer in lookup.closest()]
    assert len(closest) == COUNT
    sybils = [name for name in closest if name.startswith("sybil")]
    assert len(sybils) == limits.LOOKUP_NETWORK_MAX_COUNT
    assert closest_of([peer.peer_id for peer in others], COUNT - len(sybils)) == [n for n in closest if n not in sybils]


def test_answers_that_nobody_asked_for_and_bad_names_are_left_alone():
    lookup = Lookup(KEY, ME, named("a"), now=0.0)
    lookup.answered("stranger", named("b"))
    lookup.failed("stranger")
    assert [peer.peer_id for peer in lookup.due(0.0)] == ["a"]
    lookup.answered(
        "a",
        [
            PeerAddress("b\n\x1b[31m", ()),
            PeerAddress(ME, ()),
            PeerAddress("c", ("/ip4/1.2.3.4/udp/1", "/ip4/10.0.0.2/tcp/4")),
        ],
    )
    lookup.answered("a", named("late"))
    assert lookup.due(0.1) == [PeerAddress("c", ("/ip4/10.0.0.2/tcp/4",))]
    lookup.failed("c")
    assert lookup.is_over(0.2)
    assert [peer.peer_id for peer in lookup.closest()] == ["a"]


def test_where_it_answers_from_counts_and_not_where_it_is_said_to_listen():
    """Peers that are connected already are asked whatever addresses are told of them."""
    crowd = [PeerAddress(f"crowd{n}", (f"/ip4/20.{n}.0.1/tcp/1",)) for n in range(30)]
    honest = [PeerAddress(f"honest{n}", (f"/ip4/9.9.{n}.9/tcp/1",)) for n in range(8)]
    lookup, now = Lookup(KEY, ME, crowd + honest, now=0.0), 0.0
    while not lookup.is_over(now):
        for peer in lookup.due(now):
            address = "/ip4/8.8.4.4/tcp/9" if peer in crowd else peer.addresses[0]
            lookup.answered(peer.peer_id, (), remote_address=address)
    found = lookup.closest()
    assert len(found) == COUNT
    assert sum(peer in crowd for peer in found) <= limits.LOOKUP_NETWORK_MAX_COUNT
