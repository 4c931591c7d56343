"""TCP links: the conformance suite, and peers and networks that mean harm."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import AuthenticationError, LinkClosedError, ProtocolError, UsageError
from sparkle_mesh.tcp_info import TcpInfo
from sparkle_mesh.transport.ciphers import AES_256_GCM, CHACHA20_POLY1305
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.path_meter import PathMeter
from sparkle_mesh.transport.records import RecordOpener, RecordSealer
from sparkle_mesh.transport.tcp import GOODBYE, HEAD, MESSAGE, PAYLOAD, TcpLink
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, run_check

MIB = limits.MIB


@pytest.mark.parametrize("streams", [1, 2, 5])
@pytest.mark.parametrize("check", LINK_CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, streams: int, tcp_pair: Callable[..., Any]) -> None:
    @asynccontextmanager
    async def make_pair() -> AsyncIterator[tuple[Link, Link]]:
        async with tcp_pair(streams=streams) as pair:
            yield pair

    await run_check(check, make_pair)


class FixedClock:
    def now(self) -> float:
        return 0.0

    def wall_time(self) -> float:
        return 0.0


def seal(sealer: RecordSealer, kind: int, plaintext: bytes) -> bytes:
    out = bytearray(len(plaintext) + sealer.overhead_bytes)
    sealer.seal_into(kind, plaintext, memoryview(out))
    return bytes(out)


async def receive(link: TcpLink, times: int = 1) -> None:
    for _ in range(times):
        _, nbytes = await link.receive_header()
        await link.receive_into((bytearray(nbytes),))


def message(header: bytes = b"", payload_bytes: int = 0, inline: bytes = b"") -> bytes:
    return HEAD.pack(len(header), payload_bytes) + header + inline


async def test_chacha20(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair(CHACHA20_POLY1305) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.send, b"head", (bytes(range(256)) * 8000,))
        header, nbytes = await other.receive_header()
        payload = bytearray(nbytes)
        assert header == b"head"
        await other.receive_into((payload,))
        assert payload == bytes(range(256)) * 8000


async def test_what_it_says_of_itself(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair() as (one, other):
        assert (one.kind, one.peer_id, other.peer_id) == ("tcp", "b", "a")
        assert repr(one) == "<TcpLink to b>"
        await one.aclose()
        assert repr(one) == "<TcpLink to b closed>"


@pytest.mark.parametrize("streams", [1, 3])
async def test_latency_and_bandwidth_are_measured_by_what_passes(streams: int, tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair(streams=streams) as (one, other):
        assert one.stats.bandwidth_bytes_per_s is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, b"", (bytes(16 * MIB),))
            await receive(other)
        stats = one.stats
        if sys.platform == "linux":
            assert stats.latency_s is not None
            # On loopback; the other end's socket waits for this task's turns.
            assert 0 < stats.latency_s < 0.4
            # Where the receiver kept up, there never was more to send than was taken at once.
            assert stats.bandwidth_bytes_per_s is None or stats.bandwidth_bytes_per_s > 1e6
            assert other.stats.bandwidth_bytes_per_s is None
        else:
            assert stats.latency_s == 0.5
        await one.aclose()
        # What was measured stays known.
        assert one.stats == stats


def info(round_trip_s: float | None, bytes_per_s: float | None = None, limited: bool = False) -> TcpInfo:
    return TcpInfo(round_trip_s, bytes_per_s, limited)


def test_what_is_shown_of_a_way_follows_what_the_kernel_measured() -> None:
    now = 0.0
    meter = PathMeter(0.5, clock=FixedClock())
    meter.take([], now)
    assert (meter.latency_s, meter.bandwidth_bytes_per_s) == (0.5, None)
    # As much as there was to send says nothing of the way.
    meter.take([info(0.2, 10.0, limited=True), info(0.1)], now)
    assert (meter.latency_s, meter.bandwidth_bytes_per_s) == (0.05, None)
    meter.take([info(0.1, 100.0), info(0.2, 200.0, limited=True)], now)
    assert meter.bandwidth_bytes_per_s == 300.0
    meter.take([info(0.1, 1.0, limited=True)], now)
    assert meter.bandwidth_bytes_per_s == 300.0
    meter.take([info(0.1, 400.0, limited=True)], now)
    assert meter.bandwidth_bytes_per_s == 400.0
    # Asking often does not make older measurements fade sooner.
    for _ in range(100):
        meter.take([info(0.1, 100.0)], now)
    assert meter.bandwidth_bytes_per_s == 400.0
    meter.take([info(0.1, 100.0)], now + limits.LINK_BANDWIDTH_SMOOTHING_S)
    assert meter.bandwidth_bytes_per_s == pytest.approx(100 + 300 / 2.718281828)
    meter.take([info(0.1, 100.0)], now + 100 * limits.LINK_BANDWIDTH_SMOOTHING_S)
    assert meter.bandwidth_bytes_per_s == pytest.approx(100)


async def test_nothing_is_readable_on_the_wire(wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, _, link):
        await link.send(b"secret header", (b"secret payload",))
        await link.send(b"secret header", (b"secret payload" * 5000,))
        seen = b""
        while len(seen) < 14 * 5000:
            seen += await raw.receive_some()
        assert b"secret" not in seen
        assert len(seen) == link.stats.bytes_sent


async def test_a_small_message_is_one_record(wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (_, _, link):
        await link.send(b"h" * 64)
        assert link.stats.bytes_sent == 64 + HEAD.size + 20
        await link.send(b"h" * 64, (bytes(1000),))
        assert link.stats.bytes_sent == 2 * (64 + HEAD.size + 20) + 1000


async def test_records_may_come_byte_by_byte(wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, sealer, link):
        payload = bytes(range(200)) * 100
        stream = seal(sealer, MESSAGE, message(b"one", 3, b"abc"))
        stream += seal(sealer, MESSAGE, message(b"two", len(payload)))
        stream += seal(sealer, PAYLOAD, payload[:7]) + seal(sealer, PAYLOAD, payload[7:])
        stream += seal(sealer, GOODBYE, b"")

        async def trickle() -> None:
            edges = {*range(120), *range(len(stream) - 120, len(stream)), *range(0, len(stream), 997), len(stream)}
            cuts = sorted(edges)
            for start, end in pairwise(cuts):
                await raw.send_all(stream[start:end])
                await wait_all_tasks_blocked()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            got = bytearray(3)
            assert await link.receive_header() == (b"one", 3)
            await link.receive_into((got,))
            assert got == b"abc"
            got = bytearray(len(payload))
            assert await link.receive_header() == (b"two", len(payload))
            await link.receive_into((memoryview(got)[:5000], memoryview(got)[5000:]))
            assert got == payload
            with pytest.raises(LinkClosedError, match="peer mallory closed the link"):
                await link.receive_header()


BAD_FIRST_RECORDS = {
    "payload without a message": (PAYLOAD, b"x" * 20),
    "unknown kind": (77, b"x" * 20),
    "shorter than a head": (MESSAGE, b"x" * (HEAD.size - 1)),
    "longer than a message may be": (MESSAGE, bytes(100 * limits.KIB)),
    "goodbye with words": (GOODBYE, b"farewell"),
    "header beyond the record": (MESSAGE, HEAD.pack(5, 0) + b"abc"),
    "header too long": (MESSAGE, HEAD.pack(limits.LINK_HEADER_MAX_BYTES + 1, 0) + bytes(20 * limits.KIB)),
    "payload too long": (MESSAGE, HEAD.pack(0, limits.LINK_PAYLOAD_MAX_BYTES + 1)),
    "inline payload too short": (MESSAGE, message(b"", 4, b"abc")),
    "inline payload too long": (MESSAGE, message(b"", 2, b"abc")),
    "inline payload unannounced": (MESSAGE, message(b"", 0, b"abc")),
}


@pytest.mark.parametrize("name", BAD_FIRST_RECORDS)
async def test_records_that_break_the_protocol(name: str, wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, sealer, link):
        await raw.send_all(seal(sealer, *BAD_FIRST_RECORDS[name]))
        with pytest.raises(ProtocolError, match="peer mallory broke the protocol"):
            await link.receive_header()
        assert link.closed
        with pytest.raises(LinkClosedError, match="mallory"):
            await link.send(b"")


@pytest.mark.parametrize("record", [(PAYLOAD, b""), (PAYLOAD, b"x" * 70_001), (MESSAGE, message()), (GOODBYE, b"")])
@pytest.mark.parametrize("discard", [False, True])
async def test_payloads_that_break_the_protocol(
    record: tuple[int, bytes], discard: bool, wire_pair: Callable[..., Any]
) -> None:
    async with wire_pair() as (raw, sealer, link):
        await raw.send_all(seal(sealer, MESSAGE, message(b"", 70_000)) + seal(sealer, *record))
        await link.receive_header()
        with pytest.raises(ProtocolError, match="mallory"):
            await (link.discard_payload() if discard else link.receive_into((bytearray(70_000),)))
        assert link.closed


async def test_an_oversize_record_is_refused_before_its_bytes_come(wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, _, link):
        await raw.send_all(b"\x01\xff\xff\xff")
        with pytest.raises(ProtocolError, match=str(0xFFFFFF)):
            await link.receive_header()


async def test_forged_header_and_forged_payload(wire_pair: Callable[..., Any]) -> None:
    for forge_payload in (False, True):
        async with wire_pair() as (raw, sealer, link):
            parts = [
                bytearray(seal(sealer, MESSAGE, message(b"", 50_000))),
                bytearray(seal(sealer, PAYLOAD, bytes(50_000))),
            ]
            parts[forge_payload][-20] ^= 1
            await raw.send_all(parts[0] + parts[1])
            with pytest.raises(AuthenticationError, match="mallory"):
                await receive(link)
            assert link.closed


async def test_reflected_records_are_refused(wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, _, link):
        await link.send(b"boomerang")
        await raw.send_all(await raw.receive_some())
        with pytest.raises(AuthenticationError):
            await link.receive_header()


async def test_a_lost_connection_is_told_from_a_goodbye(wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, sealer, link):
        await raw.send_all(seal(sealer, MESSAGE, message(b"last")))
        await raw.aclose()
        assert (await link.receive_header())[0] == b"last"
        with pytest.raises(LinkClosedError, match="ended without a goodbye"):
            await link.receive_header()


@pytest.mark.parametrize("cut", [3, 40, 4000])
async def test_a_connection_lost_inside_a_message(cut: int, wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, sealer, link):
        whole = seal(sealer, MESSAGE, message(b"", 50_000)) + seal(sealer, PAYLOAD, bytes(50_000))
        await raw.send_all(whole[:cut])
        await raw.aclose()
        with pytest.raises(LinkClosedError, match="in the middle of a message"):
            await receive(link)


async def test_a_reset_connection(wire_pair: Callable[..., Any]) -> None:
    async with wire_pair() as (raw, _, link):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await raw.aclose()
        with pytest.raises(LinkClosedError, match="gone"):
            await link.receive_header()
        await link.aclose()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 300), st.binary(max_size=40), st.integers(0, 40))
def test_mutated_streams_raise_nothing_but_protocol_errors(
    wire_pair: Callable[..., Any], start: int, new: bytes, count: int
) -> None:
    async def main() -> None:
        async with wire_pair() as (raw, sealer, link):
            stream = seal(sealer, MESSAGE, message(b"header", 5, b"small")) + seal(sealer, MESSAGE, message(b"", 100))
            stream += seal(sealer, PAYLOAD, bytes(100)) + seal(sealer, GOODBYE, b"")
            changed = stream[:start] + new + stream[start + count :]
            await raw.send_all(changed)
            await raw.send_eof()
            with pytest.raises((ProtocolError, LinkClosedError)) as caught:
                await receive(link, times=4)
            # What follows a goodbye is nobody's.
            if not changed.startswith(stream):
                assert "peer mallory closed the link" not in str(caught.value), "a changed stream ended well"
            assert link.closed

    trio.run(main)


async def test_socket_options(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair() as (one, _):
        sock = one._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        # A peer may leave a full window alone for as long as a collective may take.
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == limits.COLLECTIVE_TIMEOUT_S * 1000


async def test_small_messages_are_noticed_after_large_ones(tcp_pair: Callable[..., Any]) -> None:
    # The low-water mark that large records are awaited with must not hold back what is smaller.
    async with tcp_pair() as (one, other):
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.send, b"", (bytes(8 * MIB),))
                await other.receive_header()
                await other.discard_payload()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.receive_header)
                await wait_all_tasks_blocked()
                await one.send(b"small")


async def test_closing_reports_once_and_releases_the_socket(stream_pair: Callable[..., Any]) -> None:
    released: list[TcpLink] = []
    async with stream_pair() as (a, _):
        link = TcpLink(
            a,
            "x",
            RecordSealer(AES_256_GCM, b"1" * 32),
            RecordOpener(AES_256_GCM, b"2" * 32),
            on_released=released.append,
        )
        await link.aclose()
        await link.aclose()
    assert released == [link]
    assert link._sock.fileno() == -1


async def test_closing_gives_up_on_a_peer_that_takes_nothing(
    wire_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_LINGER_S", 0.05)
    async with wire_pair() as (raw, _, link):
        with trio.move_on_after(0.05):
            await link.send(b"", (bytes(64 * MIB),))
        assert link.closed
    async with wire_pair() as (raw, sealer, link):
        # A peer that sends on and on, reads nothing, and has the window full.
        with suppress(BlockingIOError):
            while True:
                link._sock.send(bytes(MIB))
        await raw.send_all(seal(sealer, MESSAGE, message(b"unread")))
        with trio.fail_after(5):
            await link.aclose()


async def test_misuse_of_the_turn(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair() as (one, other):
        await one.send(b"", (bytes(20),))
        await other.receive_header()
        with pytest.raises(UsageError, match="not received"):
            await other.receive_header()
        await other.discard_payload()
        await one.send(b"next")
        assert (await other.receive_header())[0] == b"next"


def state_in_a_child(link: TcpLink) -> str:
    """Fork; return what became of the link's descriptor in the child after ``close_in_child``."""
    descriptor = link._sock.fileno()
    told_read, told_write = os.pipe()
    child = os.fork()
    if child == 0:
        link.close_in_child()
        link.close_in_child()
        try:
            os.fstat(descriptor)
            os.write(told_write, b"open")
        except OSError:
            os.write(told_write, b"closed" if link.closed else b"closed, and the link does not know")
        os._exit(0)
    os.close(told_write)
    told = os.read(told_read, 100).decode()
    os.close(told_read)
    os.waitpid(child, 0)
    return told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
async def test_a_forked_child_lets_go_without_a_word(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair() as (one, other):
        assert state_in_a_child(one) == "closed"
        # The parent's link works on.
        await one.send(b"still here")
        assert (await other.receive_header())[0] == b"still here"


def test_close_in_child(tcp_pair: Callable[..., Any]) -> None:
    # As in a child, where no trio run is left that would know the socket.
    links = []

    async def main() -> None:
        async with tcp_pair() as pair:
            links.extend(pair)
            for link in pair:
                link.close_in_child()

    trio.run(main)
    for link in links:
        assert link.closed
        assert link._sock.fileno() == -1
        link.close_in_child()
