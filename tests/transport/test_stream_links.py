"""Links over the control plane where nothing else comes about, and their moves to direct connections."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, LinkRefusedError, UnreachableError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric
from sparkle_mesh.transport.connector import LINK_PROTOCOL, LinkConnector
from sparkle_mesh.transport.handshake import LIBP2P_STREAM, TCP, LinkAnswer, LinkOverStream, LinkRefusal
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, run_check

OpenFabrics = Callable[..., Any]
Pair = tuple[LinkConnector, LinkConnector]


def connector(fabric: Any, *kinds: str) -> LinkConnector:
    return LinkConnector(fabric, mesh_id=b"m" * 32, authorize=lambda _: True, kinds=kinds or (TCP, LIBP2P_STREAM))


async def connect_both(one: LinkConnector, other: LinkConnector) -> tuple[Any, Any]:
    links: dict[int, Link] = {}

    async def connect(number: int, mine: LinkConnector, peer: LinkConnector) -> None:
        links[number] = await mine.connect(peer._fabric.peer_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect, 0, one, other)
        nursery.start_soon(connect, 1, other, one)
    return links[0], links[1]


@contextmanager
def no_direct_connections(*connectors: LinkConnector) -> Iterator[None]:
    """Let direct connections fail, as without a route."""

    async def fail(*_: Any) -> Link:
        raise UnreachableError("no route to host")

    with pytest.MonkeyPatch.context() as patch:
        for each in connectors:
            patch.setattr(each._data, "_reach_tcp", fail)
        yield


@asynccontextmanager
async def two_connectors(open_fabrics: OpenFabrics, *kinds: str) -> AsyncIterator[Pair]:
    async with open_fabrics() as (a, b), connector(a, *kinds) as one, connector(b, *kinds) as other:
        yield one, other


async def exchange(one: Link, other: Link) -> None:
    for sender, receiver in ((one, other), (other, one)):
        await sender.send(b"hello", (bytes(20),))
        assert (await receiver.receive_header())[0] == b"hello"
        await receiver.discard_payload()


async def wait_for_move(*links: Any) -> None:
    """Receive at all ends, as users of links do, until all have moved."""
    for link in links:
        while link.kind != TCP:
            for each in links:
                with trio.move_on_after(0.005):
                    await each.receive_header()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct connections are tried soon."""
    monkeypatch.setattr(limits, "LINK_UPGRADE_PAUSE_MIN_S", 0.02)
    monkeypatch.setattr(limits, "LINK_UPGRADE_PAUSE_MAX_S", 0.1)


@pytest.mark.parametrize("check", LINK_CHECKS, ids=lambda check: check.__name__)
async def test_links_conform_while_they_move(check: Check, soon: None, open_fabrics: OpenFabrics) -> None:
    @asynccontextmanager
    async def make_pair() -> AsyncIterator[tuple[Link, Link]]:
        async with two_connectors(open_fabrics) as pair:
            with no_direct_connections(*pair):
                links = await connect_both(*pair)
                assert links[0].kind == links[1].kind == LIBP2P_STREAM
            yield links

    await run_check(check, make_pair)


async def test_only_the_control_plane_may_be_allowed(soon: None, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics, LIBP2P_STREAM) as (one, other):
        links = await connect_both(one, other)
        await exchange(*links)
        assert links[0].kind == links[1].kind == LIBP2P_STREAM
        assert links[0].stats.latency_s is not None
        assert one.links == {links[0]}
        # Nothing better is tried, and what a peer tries is refused.
        assert not one._streams._standing
        stream = await one._fabric.open_stream(other._fabric.peer_id, LINK_PROTOCOL)
        await send_message(stream, one._party.upgrade(links[0].link_id, (), one._entropy))
        assert "no such link" in (await receive_message(stream, LinkRefusal)).reason
    assert links[0].closed
    assert links[1].closed
    assert not one.links


async def test_a_dial_that_fails_falls_back_and_the_link_moves_later(soon: None, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        tasks = trio.lowlevel.current_statistics().tasks_living
        with no_direct_connections(one, other):
            links = await connect_both(one, other)
            await exchange(*links)
            # Tries fail for a while.
            for link in links:
                with trio.move_on_after(0.1):
                    await link.receive_header()
            await exchange(*links)
            assert links[0].kind == links[1].kind == LIBP2P_STREAM
        with trio.fail_after(10):
            await wait_for_move(*links)
        await exchange(*links)
        assert one.links == {links[0]}
        assert other.links == {links[1]}
        # The stream is closed a moment later, the tries have ended.
        with trio.fail_after(5):
            while one._streams._standing or other._streams._standing:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await wait_all_tasks_blocked(0.01)
        for each in (one, other):
            assert [link.kind for link in each._data.links] == [TCP]
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        await links[0].aclose()
        with pytest.raises(LinkClosedError, match="closed the link"):
            await links[1].receive_header()


@pytest.mark.parametrize("able", [0, 1])
async def test_either_end_may_be_the_one_that_can_dial(able: int, soon: None, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as pair:
        with no_direct_connections(*pair):
            links = await connect_both(*pair)
        with no_direct_connections(pair[1 - able]), trio.fail_after(10):
            await wait_for_move(*links)
        await exchange(*links)


@contextmanager
def silent_addresses() -> Iterator[tuple[str, ...]]:
    """Addresses whose packets are dropped: of a listener whose queue is full."""
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = full.getsockname()
    clients = [socket.socket() for _ in range(3)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex(address)
    try:
        yield (f"/ip4/127.0.0.1/tcp/{address[1]}",)
    finally:
        for client in (*clients, full):
            client.close()


async def test_silent_addresses_cost_a_bounded_time(
    soon: None, open_fabrics: OpenFabrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_DIAL_TIMEOUT_S", 1.0)
    async with two_connectors(open_fabrics) as (one, other):
        with silent_addresses() as first, silent_addresses() as second, silent_addresses() as third:
            real, other._fabric.addresses = other._fabric.addresses, (*first, *second, *third)
            began = trio.current_time()
            links = await connect_both(one, other)
            assert links[0].kind == LIBP2P_STREAM
            # All addresses together, not each.
            assert 1.0 <= trio.current_time() - began < 2.5
            await exchange(*links)
            await links[0].aclose()
            # A good one behind silent ones is found meanwhile.
            other._fabric.addresses = (*first, *second, *real)
            began = trio.current_time()
            links = await connect_both(one, other)
            assert links[0].kind == TCP
            assert trio.current_time() - began < 2.0


async def test_what_cannot_be_moved_is_refused(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other), trio.open_nursery() as nursery:
        with no_direct_connections(one, other):
            links = await connect_both(one, other)
        peer_id = other._fabric.peer_id
        for moves, match in ((b"?" * 16, "no such link"), (links[0].link_id, "being tried")):
            if moves == links[0].link_id:
                other._streams.begin_move(one._fabric.peer_id, moves)
            stream = await one._fabric.open_stream(peer_id, LINK_PROTOCOL)
            await send_message(stream, one._party.upgrade(moves, (), one._entropy))
            assert match in (await receive_message(stream, LinkRefusal)).reason
        other._streams.give_up_move(links[1])
        # One that is answered, and then not opened, leaves room for another.
        monkey = pytest.MonkeyPatch()
        monkey.setattr(limits, "LINK_HANDSHAKE_TIMEOUT_S", 0.05)
        stream = await one._fabric.open_stream(peer_id, LINK_PROTOCOL)
        await send_message(stream, one._party.upgrade(links[0].link_id, (), one._entropy))
        answer = await receive_message(stream, LinkAnswer)
        assert answer.kinds == (TCP,)
        assert await stream.read(1) == b""
        monkey.undo()
        assert not other._streams._standing[one._fabric.peer_id, links[0].link_id].moving
        # The link of somebody else is no such link.
        with pytest.raises(LinkRefusedError, match="no such link"):
            other._streams.begin_move("somebody else", links[0].link_id)
        nursery.cancel_scope.cancel()


async def test_a_stream_link_that_was_not_agreed_on_is_refused(open_fabrics: OpenFabrics) -> None:
    async with open_fabrics() as (a, b), connector(b, TCP) as other, trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(UnreachableError):
                await other.connect(a.peer_id, timeout_s=0.3)

        nursery.start_soon(wait)
        async with connector(a) as one:
            stream = await a.open_stream(b.peer_id, LINK_PROTOCOL)
            await send_message(stream, one._party.offer((), one._entropy))
            assert (await receive_message(stream, LinkAnswer)).kinds == (TCP,)
            await send_message(stream, LinkOverStream(version=1))
            with pytest.raises(LinkClosedError, match="reset"):
                await stream.read(1)
        assert not other.links


async def test_an_answerer_that_wants_no_stream_link(open_fabrics: OpenFabrics) -> None:
    async with open_fabrics() as (a, b), connector(a) as one:

        async def answer(stream: Any) -> None:
            offer = await receive_message(stream, dict)
            await send_message(
                stream,
                LinkAnswer(
                    version=1, secret=bytes(32), cipher=offer["ciphers"][0], host_id=bytes(16), kinds=(LIBP2P_STREAM,)
                ),
            )
            await receive_message(stream, LinkOverStream)
            await send_message(stream, LinkRefusal(version=1, reason="changed my mind"))

        b.handle(LINK_PROTOCOL, answer)
        with pytest.raises(UnreachableError, match="changed my mind"):
            await one.connect(b.peer_id, timeout_s=0.1)
        assert not one.links


async def test_closing_a_connector_ends_what_is_under_way(soon: None, open_fabrics: OpenFabrics) -> None:
    for pause_s in (0, 0.01, 0.02, 0.03, 0.05):
        async with two_connectors(open_fabrics) as (one, other):
            with no_direct_connections(one, other):
                links = await connect_both(one, other)
            with trio.move_on_after(pause_s):
                await links[0].receive_header()
            await one.aclose()
            with pytest.raises(LinkClosedError):
                await links[1].receive_header()
        assert not one.links
        assert not other.links


async def test_a_link_moves_over_real_fabrics_under_traffic(soon: None) -> None:
    """Constant traffic both ways with a digest over all bytes, from before the move until after it."""
    sums: dict[str, str] = {}
    moved = trio.Event()

    async def send(name: str, link: Any) -> None:
        random = np.random.default_rng(len(name))
        digest, rounds_after = hashlib.sha256(), 0
        while rounds_after < 20:
            rounds_after += moved.is_set()
            payload = random.integers(0, 256, int(random.choice([0, 9, 20_000, 300_000])), np.uint8)
            await link.send(b"data", (payload,))
            digest.update(b"data" + payload.tobytes())
        await link.send(b"last")
        sums[f"sent by {name}"] = digest.hexdigest()

    async def receive(name: str, link: Any) -> None:
        digest = hashlib.sha256()
        while (header := bytes((view := await link.receive_header())[0])) != b"last":
            payload = bytearray(view[1])
            await link.receive_into((payload,))
            digest.update(header + payload)
        sums[f"received from {name}"] = digest.hexdigest()

    identities = sorted((Identity.generate() for _ in range(2)), key=lambda identity: identity.peer_id)
    with trio.fail_after(50):
        async with open_libp2p_fabric(identities[0]) as a, open_libp2p_fabric(identities[1]) as b:
            await a.connect(b.peer_id, b.addresses)
            async with connector(a) as one, connector(b) as other:
                async with trio.open_nursery() as nursery:
                    with no_direct_connections(one, other):
                        links = await connect_both(one, other)
                        assert links[0].kind == links[1].kind == LIBP2P_STREAM
                        for name, mine, theirs in (("a", *links), ("b", *links[::-1])):
                            nursery.start_soon(send, name, mine)
                            nursery.start_soon(receive, name, theirs)
                        while min(link.stats.messages_received for link in links) < 10:  # noqa: ASYNC110
                            await trio.sleep(0.01)
                    while {link.kind for link in links} != {TCP}:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                    moved.set()
                # What stood over the control plane is needed no longer.
                await a.disconnect(b.peer_id)
                await exchange(*links)
    assert sums["sent by a"] == sums["received from a"]
    assert sums["sent by b"] == sums["received from b"]
