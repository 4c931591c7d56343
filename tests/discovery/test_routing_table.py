"""The routing table: who is kept, and that few addresses cannot fill it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.discovery.routing_table import KEY_BITS, RoutingTable, distance, key_of_peer

ME = "12D3KooWMe"


def fill(table: RoutingTable, count: int, *, prefix: str = "peer", now: float = 0.0, **more: str) -> list[str]:
    return [name for name in (f"{prefix}{n}" for n in range(count)) if table.answered(name, ("/a",), now, **more)]


def test_keys_and_distances():
    key = key_of_peer(ME)
    assert len(key) * 8 == KEY_BITS
    assert distance(key, key) == 0
    assert distance(b"\0" * 32, b"\0" * 31 + b"\x05") == 5
    assert distance(key, key_of_peer("a")) == distance(key_of_peer("a"), key)


@given(names=st.sets(st.text("abcdef", min_size=1), max_size=60), target=st.binary(min_size=32, max_size=32))
def test_the_closest_are_those_of_all(names, target):
    table = RoutingTable(ME, bucket_max_count=100)
    for name in names:
        assert table.answered(name, (), 0.0)
    expected = sorted(names, key=lambda name: distance(target, key_of_peer(name)))
    assert [route.peer_id for route in table.closest(target, 7)] == expected[:7]
    if expected:
        assert [route.peer_id for route in table.closest(target, 7, but=expected[0])] == expected[1:8]
    assert len(table) == len(names)


def test_one_is_not_in_ones_own_table():
    table = RoutingTable(ME)
    assert not table.answered(ME, (), 0.0)
    assert len(table) == 0


def test_those_that_answered_for_long_are_kept_over_new_ones():
    table = RoutingTable(ME, bucket_max_count=4)
    old = fill(table, 200)
    size = len(table)
    assert len(old) == size < 60
    fill(table, 500, prefix="late", now=100.0)
    assert all(name in table for name in old)
    # The near ranges had room left, the far ones had not.
    assert size <= len(table) <= size + 4 * 4


def test_who_does_not_answer_makes_way_and_is_dropped():
    table = RoutingTable(ME, bucket_max_count=4)
    fill(table, 200)
    far = [name for name in (f"peer{n}" for n in range(200)) if name in table and _range_of(name) == KEY_BITS]
    newcomer = next(name for name in (f"late{n}" for n in range(100)) if _range_of(name) == KEY_BITS)
    assert not table.answered(newcomer, (), 1.0)
    table.failed(far[0])
    assert far[0] in table
    assert table.answered(newcomer, (), 1.0)
    assert far[0] not in table
    for _ in range(limits.ROUTING_FAILURES_MAX_COUNT):
        table.failed(far[1])
    assert far[1] not in table
    table.gone(far[2])
    table.gone("a stranger")
    table.failed("a stranger")
    assert far[2] not in table


def test_an_answer_makes_up_for_failures_and_tells_new_addresses():
    table = RoutingTable(ME)
    table.answered("a", ("/old",), 0.0)
    table.failed("a")
    table.answered("a", ("/new",), 5.0)
    table.failed("a")
    assert table.get("a").addresses == ("/new",)
    table.answered("a", (), 6.0)
    assert table.get("a").addresses == ("/new",)
    assert table.get("a").failures == 0


def test_one_network_fills_neither_a_range_nor_the_table():
    table = RoutingTable(ME)
    flood = [f"sybil{n}" for n in range(2000)]
    taken = [
        name
        for n, name in enumerate(flood)
        if table.answered(name, (), 0.0, remote_address=f"/ip4/8.8.4.{n % 250}/tcp/1")
    ]
    assert len(taken) == limits.ROUTING_NETWORK_MAX_COUNT
    ranges = [_range_of(name) for name in taken]
    assert max(map(ranges.count, ranges)) <= limits.ROUTING_NETWORK_BUCKET_MAX_COUNT
    assert table.answered("honest", (), 0.0, remote_address="/ip4/9.9.9.9/tcp/1")
    assert table.answered("neighbour", (), 0.0, remote_address="/ip4/192.168.1.5/tcp/1")


def _range_of(name: str) -> int:
    return distance(key_of_peer(ME), key_of_peer(name)).bit_length()


def test_a_range_of_one_takes_another_in_the_place_of_one_that_is_silent():
    table = RoutingTable(ME, bucket_max_count=1)
    first, second = [name for name in (f"peer{n}" for n in range(100)) if _range_of(name) == KEY_BITS][:2]
    assert table.answered(first, (), 0.0)
    table.failed(first)
    assert table.answered(second, (), 1.0)
    table.gone(second)
    assert len(table) == 0
    assert table.answered(first, (), 2.0)
