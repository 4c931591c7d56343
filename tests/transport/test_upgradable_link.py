"""Links that move: they conform before, during and after, and nothing is lost, repeated or reordered."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import ClosedError, LinkClosedError, ProtocolError, UnreachableError, UsageError
from sparkle_mesh.transport.framed import FramedLink
from sparkle_mesh.transport.link import Link, LinkStats
from sparkle_mesh.transport.shared_memory import SocketBytes
from sparkle_mesh.transport.tcp import HEAD
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, run_check
from sparkle_mesh.transport.upgradable import UpgradableLink

TcpPair = Callable[..., AbstractAsyncContextManager[tuple[Link, Link]]]
GOODBYE = HEAD.pack(2**16 - 1, 0)
MOVED = HEAD.pack(2**16 - 2, 0)


def first_pair() -> tuple[FramedLink, FramedLink]:
    ends = [trio.SocketStream(sock) for sock in trio.socket.socketpair()]
    one, other = (
        FramedLink(SocketBytes(end), peer, kind="first", may_move=True) for end, peer in zip(ends, "ba", strict=True)
    )
    return one, other


def against_bytes() -> tuple[trio.SocketStream, UpgradableLink]:
    raw, end = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
    return raw, UpgradableLink(FramedLink(SocketBytes(end), "mallory", kind="first", may_move=True), b"l" * 16)


async def move(link: UpgradableLink, to: Link) -> None:
    with suppress(ClosedError, UnreachableError):
        await link.move_to(to)


async def exchange(one: Link, other: Link) -> None:
    for sender, receiver in ((one, other), (other, one)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, b"hello")
            assert (await receiver.receive_header())[0] == b"hello"


@asynccontextmanager
async def link_pair(tcp_pair: TcpPair, when: str) -> AsyncIterator[tuple[UpgradableLink, UpgradableLink]]:
    first_one, first_other = first_pair()
    one, other = UpgradableLink(first_one, b"l" * 16), UpgradableLink(first_other, b"l" * 16)
    async with tcp_pair() as (next_one, next_other), trio.open_nursery() as nursery:
        if when != "before":
            nursery.start_soon(move, one, next_one)
            nursery.start_soon(move, other, next_other)
        if when == "after":
            await wait_all_tasks_blocked()
            await exchange(one, other)
            assert one.kind == other.kind == "tcp"
            for link in (one, other):
                assert link.stats.messages_sent == link.stats.messages_received == 1
                for field in ("bytes_sent", "bytes_received", "messages_sent", "messages_received"):
                    setattr(link.stats, field, 0)
        yield one, other
        await one.aclose()
        await other.aclose()


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("check", LINK_CHECKS, ids=lambda check: check.__name__)
async def test_links_conform(check: Check, when: str, tcp_pair: TcpPair) -> None:
    await run_check(check, lambda: link_pair(tcp_pair, when))


async def test_a_link_moves_under_traffic_and_changes_no_byte(tcp_pair: TcpPair) -> None:
    """Constant traffic of all sizes both ways, from two senders each, while the link moves."""
    under_way = trio.Event()
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    async def send(name: str, link: UpgradableLink, seed: int, stop: trio.Event) -> None:
        random = np.random.default_rng(seed)
        digest, count = hashlib.sha256(), 0
        while not stop.is_set() or count < 40:
            payload = random.integers(0, 256, int(random.choice([0, 7, 3000, 70_000, 2**20 + 9])), np.uint8)
            head = seed.to_bytes(1, "big") + count.to_bytes(4, "big")
            await link.send(head, (payload,))
            digest.update(head + payload.tobytes())
            count += 1
        await link.send(seed.to_bytes(1, "big") + b"last")
        sums[name], counts[name] = digest.hexdigest(), count

    async def receive(link: UpgradableLink, seeds: tuple[int, int]) -> None:
        digests, numbers, left = {seed: hashlib.sha256() for seed in seeds}, dict.fromkeys(seeds, 0), 2
        while left:
            view, nbytes = await link.receive_header()
            head = bytes(view)
            payload = bytearray(nbytes)
            await link.receive_into((payload,))
            if head[1:] == b"last":
                left -= 1
                continue
            assert int.from_bytes(head[1:], "big") == numbers[head[0]]
            numbers[head[0]] += 1
            if min(numbers.values()) == 5:
                under_way.set()
            digests[head[0]].update(head + payload)
        sums.update({f"received {seed}": digest.hexdigest() for seed, digest in digests.items()})

    with trio.fail_after(50):
        async with link_pair(tcp_pair, "before") as (one, other), tcp_pair() as (next_one, next_other):
            async with trio.open_nursery() as nursery:
                stop = trio.Event()
                for seed, link in enumerate((one, one, other, other)):
                    nursery.start_soon(send, f"sent {seed}", link, seed, stop)
                nursery.start_soon(receive, other, (0, 1))
                nursery.start_soon(receive, one, (2, 3))
                await under_way.wait()
                async with trio.open_nursery() as moving:
                    moving.start_soon(one.move_to, next_one)
                    moving.start_soon(other.move_to, next_other)
                assert one.kind == other.kind == "tcp"
                assert one._first.closed
                stop.set()
            assert one.stats.messages_sent == other.stats.messages_received == counts["sent 0"] + counts["sent 1"] + 2
            await exchange(one, other)
    for seed in range(4):
        assert sums[f"sent {seed}"] == sums[f"received {seed}"]


async def test_a_new_link_that_fails_before_it_is_confirmed_changes_nothing(tcp_pair: TcpPair) -> None:
    async with link_pair(tcp_pair, "before") as (one, other):
        async with tcp_pair() as (next_one, next_other):
            await next_other.aclose()
            with pytest.raises(LinkClosedError):
                await one.move_to(next_one)
            assert next_one.closed
        await exchange(one, other)
        async with tcp_pair() as (next_one, next_other):
            await next_other.send(b"something else")
            with pytest.raises(ProtocolError, match="not that it is ready"):
                await one.move_to(next_one)
        await exchange(one, other)
        assert one.kind == "first"
        # And a later one is taken.
        async with tcp_pair() as (next_one, next_other), trio.open_nursery() as nursery:
            nursery.start_soon(move, one, next_one)
            nursery.start_soon(move, other, next_other)
            await wait_all_tasks_blocked()
            await exchange(one, other)
            assert one.kind == other.kind == "tcp"
            with pytest.raises(UsageError, match="moved already"):
                await one.move_to(next_other)
            await exchange(one, other)


async def test_a_peer_that_confirms_nothing_is_not_waited_for(
    tcp_pair: TcpPair, autojump_clock: trio.abc.Clock
) -> None:
    async with link_pair(tcp_pair, "before") as (one, other), tcp_pair() as (next_one, _):
        with pytest.raises(UnreachableError, match="did not confirm a new link within 10 s"):
            await one.move_to(next_one)
        assert next_one.closed
        await exchange(one, other)


@pytest.mark.parametrize("steps", range(12))
async def test_moving_may_be_cancelled_anywhere(steps: int, tcp_pair: TcpPair) -> None:
    """What is between the two then works, or both learn that it does not; no message is lost in silence."""
    async with link_pair(tcp_pair, "before") as (one, other), tcp_pair() as (next_one, next_other):
        received: list[bytes] = []

        async def receive() -> None:
            with suppress(LinkClosedError):
                while True:
                    received.append(bytes((await other.receive_header())[0]))

        async def receive_back() -> None:
            with suppress(LinkClosedError):
                while True:
                    await one.receive_header()

        sent = 0
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                nursery.start_soon(receive_back)
                nursery.start_soon(move, other, next_other)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as moving:
                        moving.start_soon(one.move_to, next_one)
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
                with suppress(LinkClosedError):
                    for sent in range(1, 6):
                        await one.send(bytes([sent]))
                        await wait_all_tasks_blocked()
                await one.aclose()
                await other.aclose()
        assert received == [bytes([number]) for number in range(1, len(received) + 1)]
        assert len(received) >= (sent if sent == 5 else sent - 1)


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("closer", [0, 1])
async def test_closing_while_moving(steps: int, closer: int, tcp_pair: TcpPair) -> None:
    async with link_pair(tcp_pair, "before") as links, tcp_pair() as nexts, trio.open_nursery() as nursery:

        async def receive(link: UpgradableLink) -> None:
            with suppress(LinkClosedError):
                while True:
                    await link.receive_header()
            await link.aclose()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for link, to in zip(links, nexts, strict=True):
                    nursery.start_soon(move, link, to)
                    nursery.start_soon(receive, link)
                await links[closer].send(b"before")
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                await links[closer].aclose()
        for link in (*links, *nexts):
            assert link.closed


async def test_a_cancelled_wait_for_the_new_link_loses_nothing(tcp_pair: TcpPair) -> None:
    async with link_pair(tcp_pair, "before") as (one, other), tcp_pair() as (next_one, next_other):
        # The peer has moved; here the new link is not confirmed yet.
        one._next = next_one
        await other._first.send_moved()
        for _ in range(3):
            with trio.move_on_after(0.01) as scope:
                await one.receive_header()
            assert scope.cancelled_caught
        await next_other.send(b"over the new one")
        one._confirmed.set()
        assert (await one.receive_header())[0] == b"over the new one"


async def test_peers_that_move_to_nothing_or_twice_break_the_protocol(tcp_pair: TcpPair) -> None:
    raw, link = against_bytes()
    await raw.send_all(MOVED)
    with pytest.raises(ProtocolError, match="mallory broke the protocol: it moved to a link that does not stand"):
        await link.receive_header()
    assert link.closed
    with pytest.raises(LinkClosedError, match="broke the protocol"):
        await link.send(b"")
    await raw.aclose()
    for second in (MOVED, HEAD.pack(3, 0) + b"abc"):
        for at_once in (True, False):
            raw, link = against_bytes()
            async with tcp_pair() as (mine, theirs), trio.open_nursery() as nursery:
                nursery.start_soon(_move_and_find_garbage, link, mine, at_once)
                await theirs.send(b"ready")
                await wait_all_tasks_blocked()
                await raw.send_all(MOVED)
                if at_once:
                    await raw.send_all(second)
                    with pytest.raises(ProtocolError, match="it sent more where it had moved"):
                        await link.receive_header()
                else:
                    nursery.start_soon(_be_told, link)
                    await wait_all_tasks_blocked()
                    await raw.send_all(second)
                    await wait_all_tasks_blocked(0.01)
                    assert link.closed
                await link.aclose()
            await raw.aclose()


async def _be_told(link: Link) -> None:
    with pytest.raises(LinkClosedError):
        await link.receive_header()


async def _move_and_find_garbage(link: UpgradableLink, to: Link, at_once: bool) -> None:
    if at_once:
        await move(link, to)
        return
    with pytest.raises(ProtocolError, match="it sent more where it had moved"):
        await link.move_to(to)


async def test_a_new_link_that_is_lost_as_it_is_taken_ends_the_link(tcp_pair: TcpPair) -> None:
    async with link_pair(tcp_pair, "before") as (one, other), tcp_pair() as (next_one, next_other):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(move, one, next_one)
            await wait_all_tasks_blocked()
            await next_other.aclose()
        await other._first.send_moved()
        with pytest.raises(LinkClosedError, match="lost as it was taken"):
            await one.receive_header()
        assert one.closed


async def test_a_forked_child_lets_go_of_all_parts(tcp_pair: TcpPair) -> None:
    async with link_pair(tcp_pair, "before") as (one, other), tcp_pair() as (next_one, next_other):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(move, one, next_one)
            await wait_all_tasks_blocked()
            assert one.parts == {one._first, next_one}
            one.close_in_child()
            nursery.cancel_scope.cancel()
        assert one.closed
        assert other.stats == LinkStats()
        await next_other.aclose()
    assert limits.LINK_HANDSHAKE_TIMEOUT_S > limits.LINK_LINGER_S
