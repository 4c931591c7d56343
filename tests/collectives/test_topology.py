"""What ranks measure of the ways between them, and what they make of it."""

from __future__ import annotations

import random
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.collectives import calibration
from sparkle_mesh.collectives.calibration import describe_ways, make_topology, measure_lines
from sparkle_mesh.collectives.explanation import explain
from sparkle_mesh.collectives.topology import Topology, shard_shares
from sparkle_mesh.transport.memory import memory_link_pair

MB = 1e6


def slowest_s(lines: list[float], shares: list[float]) -> float:
    return max((1 + (len(lines) - 2) * share) / line for share, line in zip(shares, lines, strict=True))


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=9), st.integers(0, 2**32))
def test_no_other_shares_are_faster(lines: list[float], seed: int) -> None:
    shares = shard_shares(lines)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    if max(lines) <= min(lines) * limits.TOPOLOGY_EQUAL_LINES_RATIO:
        assert shares == [1 / len(lines)] * len(lines)
        return
    choose = random.Random(seed)
    for _ in range(20):
        other = [max(share + choose.uniform(-0.2, 0.2), 0) + 1e-9 for share in shares]
        other = [share / sum(other) for share in other]
        assert slowest_s(lines, shares) <= slowest_s(lines, other) * (1 + 1e-6)


def sites(size: int, per_site: int) -> tuple[tuple[float, ...], ...]:
    """Latencies between ranks that are dealt out to sites in turns: 1 ms within a site, 50 ms between."""
    count = size // per_site
    return tuple(
        tuple(0.0 if a == b else 1e-3 if a % count == b % count else 50e-3 for b in range(size)) for a in range(size)
    )


@pytest.mark.parametrize(("size", "per_site"), [(4, 2), (6, 3), (16, 4)])
def test_a_ring_goes_to_each_site_once(size: int, per_site: int) -> None:
    topology = Topology(size, latency_s=sites(size, per_site))
    order = topology.ring_order
    assert sorted(order) == list(range(size))
    far = sum(topology.latency(order[at - 1], order[at]) > 10e-3 for at in range(size))
    assert far == size // per_site
    if size <= 6:
        shortest = min(
            sum(topology.latency(way[at - 1], way[at]) for at in range(size)) for way in permutations(range(size))
        )
        assert sum(topology.latency(order[at - 1], order[at]) for at in range(size)) == pytest.approx(shortest)


def test_equal_ways_leave_the_order_alone() -> None:
    assert Topology(5, latency_s=((1e-3,) * 5,) * 5).ring_order == (0, 1, 2, 3, 4)
    assert Topology(9, latency_s=((1e-3,) * 9,) * 9).ring_order == tuple(range(9))
    assert Topology(3).ring_order == (0, 1, 2)


def test_uneven_lines_are_paced_if_they_are_near() -> None:
    near = ((1e-4,) * 4,) * 4
    lines = (100 * MB, 100 * MB, 100 * MB, 10 * MB)
    topology = Topology(4, (0, 1, 2, 3), lines, near)
    assert topology.is_uneven
    part = limits.TOPOLOGY_PACE_RATIO / 3
    assert topology.pace_bytes_per_s(0, 1) == pytest.approx(100 * MB * part)
    assert topology.pace_bytes_per_s(0, 3) == topology.pace_bytes_per_s(3, 0) == pytest.approx(10 * MB * part)
    assert Topology(4, (0, 1, 2, 3), lines, ((50e-3,) * 4,) * 4).pace_bytes_per_s(0, 3) is None
    assert Topology(4).pace_bytes_per_s(0, 3) is None


def rows(size: int, rates: Any = None, latency_s: float = 1e-4, hosts: Any = None) -> np.ndarray[Any, Any]:
    made = np.zeros((size, 2 + 2 * size))
    made[:, 0] = range(size) if hosts is None else hosts
    made[:, 2 : 2 + size] = 0 if rates is None else rates
    made[:, 2 + size :] = latency_s
    return made


def test_lines_are_what_both_can_send_and_receive() -> None:
    rates = np.full((3, 3), 100 * MB)
    rates[:, 2] = 10 * MB  # what rank 2 sends
    topology = make_topology(rows(3, rates))
    assert topology.lines == (100 * MB, 100 * MB, 10 * MB)
    assert topology.host_of == (0, 1, 2)
    assert topology.shares[2] == 0
    # Ranks of one host have one line, which carries what they send to others and get from them at a time.
    shared = make_topology(rows(3, rates, hosts=[5, 7, 7]))
    assert shared.lines == (100 * MB, 100 * MB, 100 * MB)
    assert shared.ranks_per_host == (1, 2, 2)
    assert make_topology(rows(4, np.full((4, 4), 50 * MB), hosts=[5, 7, 5, 7])).lines == (100 * MB,) * 4
    # Alone on one host, what was measured within it.
    assert make_topology(rows(3, rates, hosts=[5, 5, 5])).lines == (100 * MB,) * 3
    # Nothing was measured.
    assert make_topology(rows(3)).lines == (limits.TOPOLOGY_LINE_MAX_BYTES_PER_S,) * 3
    # Over long ways, lines are alike.
    assert make_topology(rows(3, rates, latency_s=25e-3)).lines == (100 * MB,) * 3


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=24, max_size=24))
def test_whatever_ranks_say_makes_a_topology(numbers: list[float]) -> None:
    topology = make_topology(np.array(numbers).reshape(3, 8))
    assert all(0 < line <= limits.TOPOLOGY_LINE_MAX_BYTES_PER_S for line in topology.lines)
    assert all(0 <= latency <= limits.TOPOLOGY_LATENCY_MAX_S for row in topology.latency_s for latency in row)
    assert sum(topology.shares) == pytest.approx(1)
    assert sorted(topology.ring_order) == [0, 1, 2]
    assert "all_reduce of 1000000 bytes over 3 ranks" in str(explain(10**6, topology, shared=False))


async def test_lines_are_measured(autojump_clock: trio.testing.MockClock) -> None:
    size = 4
    links: list[dict[int, Any]] = [{} for _ in range(size)]
    for one in range(size):
        for other in range(one + 1, size):
            rate = 1 * MB if 3 in (one, other) else 20 * MB
            links[one][other], links[other][one] = memory_link_pair(
                str(one), str(other), delay_s=1e-4, rate_bytes_per_s=rate
            )
    measured: list[Any] = [None] * size

    async def rank(number: int) -> None:
        measured[number] = describe_ways(await measure_lines(number, size, links[number]), bytes([number]) * 16)

    async with trio.open_nursery() as nursery:
        for number in range(size):
            nursery.start_soon(rank, number)
    topology = make_topology(np.array(measured))
    assert topology.host_of == (0, 1, 2, 3)
    assert topology.lines[3] < topology.lines[0] / 4
    assert topology.shares[3] == 0


async def test_where_some_share_memory_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    links: list[dict[int, Any]] = [{} for _ in range(3)]
    sharing = set()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        links[one][other], links[other][one] = pair = memory_link_pair(str(one), str(other), rate_bytes_per_s=20 * MB)
        if one == 0:
            sharing.update(pair)
    monkeypatch.setattr(calibration, "_shares_memory", lambda link: link in sharing)
    measured: list[Any] = [None] * 3

    async def rank(number: int) -> None:
        measured[number] = (await measure_lines(number, 3, links[number]))[0]

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(rank, number)
    assert [list(rates > 0) for rates in measured] == [[False] * 3, [False, False, True], [False, True, False]]


@pytest.mark.parametrize(("header", "payload"), [(b"probe", b"early"), (b"else", b"")])
async def test_the_link_to_who_is_not_ready_for_probes_is_closed(
    caplog: pytest.LogCaptureFixture, header: bytes, payload: bytes
) -> None:
    one, other = memory_link_pair("0", "1")
    await one.send(header, (payload,))
    assert (await measure_lines(0, 2, {1: other}))[0].tolist() == [0, 0]
    assert other.closed
    assert "came before probes of lines" in caplog.text


@pytest.mark.parametrize(("header", "payload"), [(b"else", b""), (b"probe", b"short"), (b"last probe", b"x")])
async def test_the_link_over_which_something_else_comes_than_probes_is_closed(
    caplog: pytest.LogCaptureFixture, header: bytes, payload: bytes
) -> None:
    one, other = memory_link_pair("0", "1")
    await one.send(b"ready")
    await one.send(header, (payload,))
    assert (await measure_lines(0, 2, {1: other}))[0].tolist() == [0, 0]
    assert other.closed
    assert "where probes of lines belong" in caplog.text


async def test_a_link_that_has_ended_tells_nothing_of_its_line() -> None:
    one, other = memory_link_pair("0", "1")
    await one.aclose()
    assert (await measure_lines(0, 2, {1: other}))[0].tolist() == [0, 0]
