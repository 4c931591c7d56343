"""Memory links: the conformance suite, and time under a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, UsageError
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.memory import MemoryLink, memory_link_pair
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, check_link, run_check

KINDS = {
    "plain": {},
    "small": {"capacity_bytes": 20_000},
    "slow": {"delay_s": 0.003, "rate_bytes_per_s": 1e9},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", LINK_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, kind: str, autojump_clock: MockClock) -> None:
    @asynccontextmanager
    async def make_pair() -> AsyncIterator[tuple[Link, Link]]:
        yield memory_link_pair("a", "b", **KINDS[kind])  # type: ignore[arg-type]

    await run_check(check, make_pair)


async def test_the_suite_names_the_check_that_fails(autojump_clock: MockClock) -> None:
    class Swapped(MemoryLink):
        async def receive_header(self) -> tuple[memoryview, int]:
            header, nbytes = await super().receive_header()
            return memoryview(bytes(header)[::-1]), nbytes

    @asynccontextmanager
    async def make_pair() -> AsyncIterator[tuple[Link, Link]]:
        one, other = memory_link_pair("a", "b")
        one.__class__ = other.__class__ = Swapped
        yield one, other

    with pytest.raises(ExceptionGroup) as caught:
        await check_link(make_pair)
    assert caught.value.__notes__ == ["in the link check messages_arrive_in_order_both_ways"]


async def test_ends_know_each_other() -> None:
    one, other = memory_link_pair("a", "b")
    assert (one.peer_id, other.peer_id, one.kind) == ("b", "a", "memory")
    assert repr(one) == "<MemoryLink to b>"
    one.close_in_child()
    assert not one.closed
    await one.aclose()
    assert repr(one) == "<MemoryLink to b closed>"


async def test_delay_and_rate_are_exact(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b", delay_s=0.5, rate_bytes_per_s=1000)
    start = trio.current_time()
    await one.send(b"", (bytes(984),))
    assert trio.current_time() == start
    _, nbytes = await other.receive_header()
    assert trio.current_time() - start == pytest.approx(0.5 + 16 / 1000)
    await other.receive_into((bytearray(nbytes),))
    assert trio.current_time() - start == pytest.approx(0.5 + 1.0)


async def test_capacity_holds_the_sender(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b", capacity_bytes=20_000, rate_bytes_per_s=10_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send, b"", (bytes(60_000 - 16),))
        await wait_all_tasks_blocked()
        _, nbytes = await other.receive_header()
        await other.receive_into((bytearray(nbytes),))
    assert trio.current_time() == pytest.approx(6.0)


async def test_a_drop_loses_what_is_in_flight(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b", delay_s=1.0)
    await one.send(b"lost")

    async def receive() -> None:
        with pytest.raises(LinkClosedError, match="lost"):
            await other.receive_header()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        one.drop()
    assert one.closed
    assert other.closed
    with pytest.raises(LinkClosedError, match="lost"):
        await one.send(b"")
    await other.aclose()
    other.drop()


async def test_a_drop_wakes_a_clogged_sender(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b")

    async def send() -> None:
        with pytest.raises(LinkClosedError, match="lost"):
            await one.send(b"", (bytes(2 * limits.MEMORY_LINK_CAPACITY_BYTES),))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        other.drop()


async def test_a_partition_holds_messages_until_it_heals(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b", delay_s=1.0)
    await one.send(b"before")
    await trio.sleep(0.25)
    one.partition()
    other.partition()
    await one.send(b"during")
    await other.send(b"back")
    with trio.move_on_after(100) as scope:
        await other.receive_header()
    assert scope.cancelled_caught
    one.heal()
    one.heal()
    healed_at = trio.current_time()
    assert (await other.receive_header())[0] == b"before"
    assert trio.current_time() - healed_at == pytest.approx(0.75)
    assert (await other.receive_header())[0] == b"during"
    assert trio.current_time() - healed_at == pytest.approx(1.0)
    assert (await one.receive_header())[0] == b"back"


async def test_what_arrived_before_a_partition_can_be_read_in_it(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b", delay_s=1.0, rate_bytes_per_s=1000)
    await one.send(b"there")
    await trio.sleep(2)
    one.partition()
    assert (await other.receive_header())[0] == b"there"
    await one.aclose()
    with trio.move_on_after(10) as scope:
        await other.receive_header()
    assert scope.cancelled_caught, "the end of the link came through the partition"
    other.heal()
    with pytest.raises(LinkClosedError):
        await other.receive_header()


async def test_a_partition_stops_senders_at_the_capacity(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b", capacity_bytes=20_000)
    one.partition()
    with trio.move_on_after(10) as scope:
        await one.send(b"", (bytes(50_000),))
    assert scope.cancelled_caught
    assert one.closed
    other.heal()
    _, nbytes = await other.receive_header()
    with pytest.raises(LinkClosedError):
        await other.receive_into((bytearray(nbytes),))


async def test_a_closed_peer_is_noticed_after_the_delay(autojump_clock: MockClock) -> None:
    one, other = memory_link_pair("a", "b", delay_s=1.0)
    await other.aclose()
    await one.send(b"not yet known")
    await trio.sleep(1)
    with pytest.raises(LinkClosedError, match="peer b closed"):
        await one.send(b"known")


@pytest.mark.parametrize("wrong", [{"delay_s": -1}, {"rate_bytes_per_s": 0}, {"capacity_bytes": 100}])
def test_impossible_figures_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        memory_link_pair("a", "b", **wrong)  # type: ignore[arg-type]
