"""Links through the connector: over fabrics in one process with real ports, and over real ones."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, LinkRefusedError, UnreachableError, UsageError, VersionError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric
from sparkle_mesh.transport import data_connections
from sparkle_mesh.transport.attempts import Attempt
from sparkle_mesh.transport.connector import LINK_PROTOCOL, LinkConnector
from sparkle_mesh.transport.handshake import (
    LIBP2P_STREAM,
    LINK_KINDS,
    MAGIC,
    SHARED_MEMORY,
    TCP,
    LinkAnswer,
    LinkOffer,
    LinkRefusal,
)
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, run_check

MESH = b"m" * 32
OpenFabrics = Callable[..., Any]


def anyone(_peer_id: str) -> bool:
    return True


def connector(fabric: Any, *, mesh_id: bytes = MESH, authorize: Callable[[str], bool] = anyone, **options: Any) -> Any:
    return LinkConnector(fabric, mesh_id=mesh_id, authorize=authorize, **options)


async def connect_both(one: LinkConnector, other: LinkConnector, **options: float) -> tuple[Link, Link]:
    links: dict[int, Link] = {}

    async def connect(number: int, mine: LinkConnector, peer: LinkConnector) -> None:
        links[number] = await mine.connect(peer._fabric.peer_id, **options)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect, 0, one, other)
        nursery.start_soon(connect, 1, other, one)
    return links[0], links[1]


@asynccontextmanager
async def two_connectors(
    open_fabrics: OpenFabrics, kinds: Sequence[str] | None = None
) -> AsyncIterator[tuple[LinkConnector, LinkConnector]]:
    async with open_fabrics() as (a, b), connector(a, kinds=kinds) as one, connector(b, kinds=kinds) as other:
        yield one, other


async def exchange(one: Link, other: Link) -> None:
    await one.send(b"there", (bytes(20),))
    await other.send(b"back")
    assert (await other.receive_header())[0] == b"there"
    await other.discard_payload()
    assert (await one.receive_header())[0] == b"back"


async def test_two_peers_get_a_link(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        link, peer_link = await connect_both(one, other)
        assert (link.peer_id, peer_link.peer_id) == (other._fabric.peer_id, one._fabric.peer_id)
        assert link.stats.latency_s is not None
        await exchange(link, peer_link)
        assert one.links == {link}
    assert link.closed
    assert peer_link.closed
    assert not one.links


@pytest.mark.parametrize("check", [LINK_CHECKS[0], LINK_CHECKS[14]], ids=lambda check: check.__name__)
async def test_links_conform(check: Check, open_fabrics: OpenFabrics) -> None:
    @asynccontextmanager
    async def make_pair() -> AsyncIterator[tuple[Link, Link]]:
        async with two_connectors(open_fabrics) as (one, other):
            yield await connect_both(one, other)

    await run_check(check, make_pair)


@pytest.mark.parametrize("late", [0, 1])
async def test_either_side_may_be_late(late: int, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as pair, trio.open_nursery() as nursery:
        early = pair[1 - late]
        nursery.start_soon(early.connect, pair[late]._fabric.peer_id)
        await wait_all_tasks_blocked(0.01)
        await pair[late].connect(early._fabric.peer_id)


@pytest.mark.parametrize("first", [0, 1])
async def test_concurrent_calls_share_a_link(first: int, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as pair:
        links = []

        async def connect(mine: LinkConnector, peer: LinkConnector) -> None:
            links.append(await mine.connect(peer._fabric.peer_id))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(connect, pair[first], pair[1 - first])
            await wait_all_tasks_blocked()
            nursery.start_soon(pair[1 - first].connect, pair[first]._fabric.peer_id)
        assert len(links) == 3
        assert len(set(links)) == 1


async def test_reconnecting_gives_a_new_link(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        first = await connect_both(one, other)
        await first[0].aclose()
        second = await connect_both(one, other)
        assert second[0] is not first[0]
        await exchange(*second)
        # The former link of the other side, which it has not closed yet, is of no consequence.
        assert not first[1].closed
        assert one.links == {second[0]}


async def test_no_link_to_a_peer_that_does_not_want_one(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        with pytest.raises(UnreachableError, match=r"within 0\.1 s: it has the offer, and does not want a link"):
            await one.connect(other._fabric.peer_id, timeout_s=0.1)
        await wait_all_tasks_blocked()
        with pytest.raises(UnreachableError, match=r"within 0\.1 s: it has not asked"):
            await other.connect(one._fabric.peer_id, timeout_s=0.1)
        assert not other._offers
        # Neither leaves anything behind that would disturb a later one.
        await exchange(*await connect_both(one, other))


async def test_dead_peers_are_unreachable_by_the_deadline(open_fabrics: OpenFabrics) -> None:
    async with open_fabrics(connect=False) as (a, b), connector(a) as one, connector(b) as other:
        for mine, peer in ((one, other), (other, one)):
            with trio.fail_after(5), pytest.raises(UnreachableError, match=r"within 0\.05 s"):
                await mine.connect(peer._fabric.peer_id, timeout_s=0.05)


async def test_a_cancelled_call_leaves_nothing(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        for mine, peer in ((one, other), (other, one)):
            with trio.move_on_after(0.01) as scope:
                await mine.connect(peer._fabric.peer_id)
            assert scope.cancelled_caught
            assert not mine._attempts
        await wait_all_tasks_blocked(0.01)
        assert not one.links
        assert not other.links


async def test_unauthorized_peers_are_refused_and_told(open_fabrics: OpenFabrics) -> None:
    async with open_fabrics() as (a, b), connector(a) as one, connector(b, authorize=lambda _: False) as other:
        with pytest.raises(LinkRefusedError, match="not admitted to the mesh there"):
            await one.connect(b.peer_id)
        with pytest.raises(LinkRefusedError, match="not admitted here"):
            await other.connect(a.peer_id)


async def test_the_mesh_ids_must_agree(open_fabrics: OpenFabrics) -> None:
    async with (
        open_fabrics() as (a, b),
        connector(a) as one,
        connector(b, mesh_id=b"x" * 32) as other,
        trio.open_nursery() as nursery,
    ):

        async def wait() -> None:
            with pytest.raises(UnreachableError):
                await other.connect(a.peer_id, timeout_s=0.2)

        nursery.start_soon(wait)
        with pytest.raises(LinkRefusedError, match="different meshes"):
            await one.connect(b.peer_id)


async def test_another_version_is_an_error_on_both_sides(
    open_fabrics: OpenFabrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_connectors(open_fabrics) as (one, other), trio.open_nursery() as nursery:
        stream = await one._fabric.open_stream(other._fabric.peer_id, LINK_PROTOCOL)

        async def wait() -> None:
            with pytest.raises(VersionError, match="version 2"):
                await other.connect(one._fabric.peer_id)

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        await send_message(stream, LinkRefusal(version=2, reason="from the future"))
        reply = await receive_message(stream, LinkRefusal)
        assert reply.version == 1
        assert "version 2" in reply.reason

        async def answer_with_version_2(offered: Any) -> None:
            await receive_message(offered, LinkOffer)
            await send_message(offered, LinkRefusal(version=2, reason="you are too old"))

        other._fabric.handle(LINK_PROTOCOL, answer_with_version_2)
        with pytest.raises(VersionError, match="version 2"):
            await one.connect(other._fabric.peer_id)


async def test_misuse(open_fabrics: OpenFabrics) -> None:
    async with open_fabrics() as (a, b):
        with pytest.raises(UsageError, match="31 bytes"):
            connector(a, mesh_id=bytes(31))
        async with connector(a) as one:
            with pytest.raises(UsageError, match="itself"):
                await one.connect(a.peer_id)
        with pytest.raises(LinkClosedError, match="closed"):
            await one.connect(b.peer_id)


async def test_closing_ends_waiting_calls(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as pair, trio.open_nursery() as nursery:

        async def wait(mine: LinkConnector, peer: LinkConnector) -> None:
            with pytest.raises(LinkClosedError, match="connector was closed"):
                await mine.connect(peer._fabric.peer_id)

        for mine, peer in (pair, pair[::-1]):
            nursery.start_soon(wait, mine, peer)
            await wait_all_tasks_blocked()
            await mine.aclose()
            await mine.aclose()


async def test_a_closing_peer_says_so(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        await other.aclose()
        with pytest.raises(LinkRefusedError, match="closing"):
            await one.connect(other._fabric.peer_id)


async def test_waiting_offers_end_when_closing(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other), trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(UnreachableError):
                await one.connect(other._fabric.peer_id, timeout_s=0.3)

        nursery.start_soon(wait)
        await wait_all_tasks_blocked(0.01)
        assert other._offers
        await other.aclose()
        await wait_all_tasks_blocked(0.01)
        assert not other._offers


async def test_the_larger_id_may_not_offer(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        stream = await other._fabric.open_stream(one._fabric.peer_id, LINK_PROTOCOL)
        await send_message(stream, other._party.offer((), other._entropy))
        assert "smaller id" in (await receive_message(stream, LinkRefusal)).reason


async def test_waiting_offers_are_bounded(open_fabrics: OpenFabrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINK_OFFERS_WAITING_MAX_COUNT", 0)
    async with two_connectors(open_fabrics) as (one, other):
        with pytest.raises(LinkRefusedError, match="too many"):
            await one.connect(other._fabric.peer_id)


async def test_a_newer_offer_takes_the_place_of_an_older(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        stream = await one._fabric.open_stream(other._fabric.peer_id, LINK_PROTOCOL)
        await send_message(stream, one._party.offer((), one._entropy))
        await wait_all_tasks_blocked()
        (older,) = other._offers.values()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, other._fabric.peer_id)
            assert await stream.read(1) == b""
            assert list(other._offers.values()) != [older]
            await other.connect(one._fabric.peer_id)


async def test_an_unreachable_answerer_hears_of_it(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics, [TCP]) as (one, other), trio.open_nursery() as nursery:
        # A port where nobody listens, one where somebody else does, and no port at all.
        (stranger,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = stranger.socket.getsockname()[1]
        (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        closed_port = silent.socket.getsockname()[1]
        await silent.aclose()

        async def impostor(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(bytes(32))

        nursery.start_soon(trio.serve_listeners, impostor, [stranger])
        other._fabric.addresses = (f"/ip4/127.0.0.1/tcp/{closed_port}", f"/ip4/127.0.0.1/tcp/{port}", "/dns/x/tcp/1")

        async def wait() -> None:
            with pytest.raises(UnreachableError, match="does not hold the keys"):
                await other.connect(one._fabric.peer_id, timeout_s=0.15)

        nursery.start_soon(wait)
        with pytest.raises(UnreachableError, match=f"port {closed_port}: .*; 127.0.0.1 port {port}: .*not hold"):
            await one.connect(other._fabric.peer_id, timeout_s=0.1)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("opening", [MAGIC, MAGIC + bytes(56), MAGIC + bytes(30)])
async def test_uninvited_data_connections_are_dropped(opening: bytes, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        port = int(other._fabric.addresses[0].rpartition("/")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(opening)
            await stream.send_eof()
            assert await stream.receive_some() == b""
        assert len(other._fabric.refused) == 1
        await exchange(*await connect_both(one, other))


async def test_an_idle_data_connection_is_dropped(open_fabrics: OpenFabrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINK_HANDSHAKE_TIMEOUT_S", 0.05)
    async with two_connectors(open_fabrics) as (_, other):
        port = int(other._fabric.addresses[0].rpartition("/")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(MAGIC)
            assert await stream.receive_some() == b""


async def test_garbage_offers_leave_the_connector_serving(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other):
        for garbage in (b"\0\0\0\1\xc1", b"\xff\xff\xff\xff", b"\0\0"):
            stream = await one._fabric.open_stream(other._fabric.peer_id, LINK_PROTOCOL)
            await stream.write(garbage)
            await stream.aclose()
        await exchange(*await connect_both(one, other))


async def test_an_answerer_that_answers_garbage(open_fabrics: OpenFabrics) -> None:
    async with open_fabrics() as (a, b), connector(a) as one:
        answers: list[Any] = [
            LinkAnswer(version=1, secret=bytes(32), cipher="rot13", host_id=bytes(16)),
            LinkAnswer(version=1, secret=bytes(32), cipher="aes-256-gcm", host_id=bytes(16)),
        ]

        async def answer(stream: Any) -> None:
            await receive_message(stream, msgspec.Raw)
            await send_message(stream, answers[0])
            await stream.read(1)

        b.handle(LINK_PROTOCOL, answer)
        with pytest.raises(UnreachableError, match="rot13"):
            await one.connect(b.peer_id, timeout_s=0.1)
        del answers[0]
        with pytest.raises(UnreachableError, match="it gave no address"):
            await one.connect(b.peer_id, timeout_s=0.1)


async def test_a_link_that_nobody_took_is_closed(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(other.connect, one._fabric.peer_id)
        with trio.CancelScope() as scope:
            succeed = Attempt.succeed

            def cancel_at_the_last_moment(self: Attempt, link: Any) -> None:
                succeed(self, link)
                if link in one.links:
                    scope.cancel()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Attempt, "succeed", cancel_at_the_last_moment)
                await one.connect(other._fabric.peer_id)
        await wait_all_tasks_blocked(0.01)
        # Which of the two won is the scheduler's; either way nothing is left open and unowned.
        assert not scope.cancelled_caught or not one.links


async def test_a_data_connection_that_comes_too_late(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(_connect_and_be_refused, other, one._fabric.peer_id)
        await wait_all_tasks_blocked()
        stream = await one._fabric.open_stream(other._fabric.peer_id, LINK_PROTOCOL)
        offer = one._party.offer((), one._entropy)
        await send_message(stream, offer)
        answer = await receive_message(stream, LinkAnswer)
        keys = one._party.accept(offer, answer, other._fabric.peer_id)
        other._attempts[one._fabric.peer_id].fail(LinkRefusedError("changed its mind"))
        port = int(other._fabric.addresses[0].rpartition("/")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as data:
            await data.send_all(keys.opening(0))
            with pytest.raises(LinkClosedError):
                await _read_to_the_end(data)
        assert not other.links


async def _connect_and_be_refused(mine: LinkConnector, peer_id: str) -> None:
    with pytest.raises(LinkRefusedError, match="changed its mind"):
        await mine.connect(peer_id)


async def _read_to_the_end(stream: trio.SocketStream) -> None:
    while await stream.receive_some():
        pass
    raise LinkClosedError("the end")


async def test_a_connection_made_while_closing_is_closed(open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics, [TCP]) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(other.connect, one._fabric.peer_id)
        await wait_all_tasks_blocked()
        one._data.closed = True
        with pytest.raises(UnreachableError, match="connector is closed"):
            await one._dial_once(other._fabric.peer_id, Attempt())
        assert not one.links


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("kind", LINK_KINDS)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
async def test_two_hundred_links_leave_no_socket_and_no_task(kind: str, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics, [kind]) as (one, other):
        await (await connect_both(one, other))[0].aclose()
        for link in one.links | other.links:
            await link.aclose()
        await wait_all_tasks_blocked()
        gc.collect()  # arenas of earlier tests
        tasks, descriptors = trio.lowlevel.current_statistics().tasks_living, open_descriptors()
        for _ in range(200):
            links = await connect_both(one, other)
            await links[0].aclose()
            with pytest.raises(LinkClosedError):
                await links[1].receive_header()
        await wait_all_tasks_blocked()
        assert not one.links
        assert len(open_descriptors()) == len(descriptors)
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert not one.links
        assert not other.links
        assert not one._expected
        assert not other._expected
        assert len(other._pending) == 0


def descriptors_closed_in_a_child(*connectors: LinkConnector) -> int:
    """Fork; return how many descriptors fewer the child had after ``close_in_child``."""
    told_read, told_write = os.pipe()
    child = os.fork()
    if child == 0:
        before = len(open_descriptors())
        for each in connectors:
            each.close_in_child()
        os.write(told_write, str(before - len(open_descriptors())).encode())
        os._exit(0)
    os.close(told_write)
    count = int(os.read(told_read, 100))
    os.close(told_read)
    os.waitpid(child, 0)
    return count


@pytest.mark.parametrize("kind", LINK_KINDS)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
async def test_a_forked_child_lets_go_of_all_links(kind: str, open_fabrics: OpenFabrics) -> None:
    async with two_connectors(open_fabrics, [kind]) as (one, other):
        links = await connect_both(one, other)
        # A connection that is being dialed is let go of, too.
        sock = trio.socket.socket()
        one._data._dialing.add(sock)
        # Of shared memory: either side's arena and its mapping, bell and listener, and the other's arena and bell.
        # A stream is its fabric's.
        expected = {TCP: 3, SHARED_MEMORY: 15, LIBP2P_STREAM: 1}
        assert descriptors_closed_in_a_child(one, other) == expected[kind]
        one._data._dialing.discard(sock)
        sock.close()
        await exchange(*links)


def far_away(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(data_connections, "stream_count", lambda _round_trip_s, _control, most: min(count, most))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("count", [1, 2, 5])
async def test_links_of_several_streams(
    count: int, host: str, open_fabrics: OpenFabrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this host has no IPv6")
    far_away(monkeypatch, count)
    async with open_fabrics(host=host) as (a, b), connector(a, kinds=["tcp"]) as one, connector(b) as other:
        for _ in range(2):
            link, peer_link = await connect_both(one, other)
            assert len(link._sockets()) == len(peer_link._sockets()) == count
            await exchange(link, peer_link)
            payload, got = bytes(range(256)) * 4000, bytearray(256 * 4000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer_link.send, b"large", (payload,))
                await link.receive_header()
                await link.receive_into((got,))
            assert got == payload
            await link.aclose()
            with pytest.raises(LinkClosedError, match="closed the link"):
                await peer_link.receive_header()
        assert not one._data._dialing
        assert not other._expected
        assert len(other._pending) == 0


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def test_a_link_whose_other_streams_do_not_come(
    open_fabrics: OpenFabrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    far_away(monkeypatch, 3)
    monkeypatch.setattr(limits, "LINK_WELCOME_TIMEOUT_S", 0.1)
    async with two_connectors(open_fabrics, ["tcp"]) as (one, other):
        connect = one._data._connect
        calls = 0

        async def connect_twice(*address: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 3 == 0:
                await trio.sleep_forever()
            return await connect(*address)

        monkeypatch.setattr(one._data, "_connect", connect_twice)
        async with trio.open_nursery() as nursery:

            async def fail(mine: LinkConnector, peer: LinkConnector) -> None:
                with pytest.raises(UnreachableError):
                    await mine.connect(peer._fabric.peer_id, timeout_s=0.25)

            nursery.start_soon(fail, one, other)
            nursery.start_soon(fail, other, one)
        await wait_all_tasks_blocked(0.15)
        assert not one.links
        assert not other.links
        assert not one._data._dialing
        assert not other._expected
        assert any("did not open the other streams" in str(error) for error in other._fabric.refused)


async def test_over_real_fabrics() -> None:
    identities = sorted((Identity.generate() for _ in range(3)), key=lambda identity: identity.peer_id)
    async with (
        open_libp2p_fabric(identities[0]) as a,
        open_libp2p_fabric(identities[1]) as b,
        open_libp2p_fabric(identities[2]) as c,
    ):
        await a.connect(b.peer_id, b.addresses)
        await c.connect(a.peer_id, a.addresses)
        await c.connect(b.peer_id, b.addresses)
        async with connector(a) as one, connector(b) as other, connector(c) as third:
            for left, right in ((one, other), (one, third), (other, third)):
                await exchange(*await connect_both(left, right))
            # The port is shared: strangers that only know the magic get nowhere, and nothing breaks.
            port = int(b.addresses[0].rpartition("/")[2])
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(MAGIC + bytes(56))
                assert await stream.receive_some() == b""
            await exchange(*await connect_both(one, other))
