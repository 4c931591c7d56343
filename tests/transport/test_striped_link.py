"""Links over several connections: what a hostile peer or network may do to stripes, and how they spread."""

from __future__ import annotations

import socket
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import AuthenticationError, LinkClosedError, ProtocolError
from sparkle_mesh.transport.records import PLACE, PREFIX_BYTES, RecordSealer
from sparkle_mesh.transport.strand import STRAND_GOODBYE, STRIPE
from sparkle_mesh.transport.striped import StripedTcpLink
from sparkle_mesh.transport.stripes import Arrivals, Window, stripes
from sparkle_mesh.transport.tcp import GOODBYE, HEAD, MESSAGE

# Small, so that a whole payload is taken by the kernels' buffers.
SIZE = 8 * limits.KIB
PAYLOAD = bytes(range(251)) * (3 * SIZE // 251 + 1)
TOTAL = len(PAYLOAD)
assert 3 * SIZE < TOTAL < 4 * SIZE
# The fixtures hold for all examples of a test.
NO_RESET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _small_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINK_STRIPE_BYTES", SIZE)


def head(total: int = TOTAL, header: bytes = b"h") -> bytes:
    return HEAD.pack(len(header), total) + header


def seal(sealer: RecordSealer, kind: int, plaintext: bytes, place: tuple[int, int] | None = None) -> bytes:
    out = bytearray(len(plaintext) + sealer.overhead_bytes)
    sealer.seal_into(kind, plaintext, memoryview(out), b"" if place is None else PLACE.pack(*place))
    return bytes(out)


class Mallory:
    """A peer that holds the keys, and sends what it likes."""

    def __init__(self, raw: list[Any]) -> None:
        self.streams = [stream for stream, _, _ in raw]
        self.sealers = [sealer for _, sealer, _ in raw]

    async def announce(self, total: int = TOTAL) -> None:
        await self.streams[0].send_all(seal(self.sealers[0], MESSAGE, head(total)))

    def stripe(self, strand: int, index: int, number: int = 0) -> bytes:
        """Seal the right stripe ``index`` of the payload."""
        offset = index * SIZE
        return seal(self.sealers[strand], STRIPE, PAYLOAD[offset : offset + SIZE], (number, offset))

    async def send(self, strand: int, *records: bytes) -> None:
        await self.streams[strand].send_all(b"".join(records))


async def receive(link: StripedTcpLink) -> bytes:
    _, nbytes = await link.receive_header()
    payload = bytearray(nbytes)
    await link.receive_into((payload,))
    return bytes(payload)


async def assert_refused(link: StripedTcpLink, error: type[Exception], match: str = "mallory") -> None:
    with trio.fail_after(5), pytest.raises(error, match=match):
        await receive(link)
    assert link.closed
    with pytest.raises(LinkClosedError, match="mallory"):
        await link.send(b"")


# --- The pure part -------------------------------------------------------------------------------


@NO_RESET
@given(st.lists(st.integers(1, 2 * SIZE + 5), min_size=1, max_size=6))
def test_stripes_make_up_the_payload(sizes: list[int]) -> None:
    data = (PAYLOAD * 4)[: sum(sizes)]
    views, start = [], 0
    for size in sizes:
        views.append(memoryview(data)[start : start + size])
        start += size
    arrivals = Arrivals(3, len(data))
    came = b""
    for offset, plaintext in stripes(views):
        assert offset == len(came)
        assert arrivals.is_due(3, offset, len(plaintext), len(data))
        arrivals.add(offset)
        came += plaintext
    assert came == data


@NO_RESET
@given(st.permutations(range(4)), st.integers(1, TOTAL - 1), st.integers(1, TOTAL - 1))
def test_stripes_may_arrive_in_any_order(order: list[int], cut: int, hole: int) -> None:
    target = bytearray(TOTAL)
    views = [memoryview(target)[: min(cut, hole)], memoryview(target)[min(cut, hole) : max(cut, hole)]]
    views = [view for view in [*views, memoryview(target)[max(cut, hole) :]] if view]
    window = Window(0, TOTAL, views)
    arrivals = Arrivals(0, TOTAL)
    for index in order:
        data = memoryview(PAYLOAD)[index * SIZE : (index + 1) * SIZE]
        assert arrivals.is_due(0, index * SIZE, len(data), TOTAL)
        place = window.place(index * SIZE, len(data))
        if place is None:
            assert not window.put(index * SIZE, data)
        else:
            place[:] = data
            window.missing_bytes -= len(data)
        arrivals.add(index * SIZE)
        with pytest.raises(ProtocolError, match="none of the stripes"):
            arrivals.is_due(0, index * SIZE, len(data), TOTAL)
    assert not window.missing_bytes
    assert target == PAYLOAD


@NO_RESET
@given(st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(1, SIZE))
def test_places_that_are_not_those_of_stripes(number: int, offset: int, length: int) -> None:
    arrivals = Arrivals(1, TOTAL)
    right = offset % SIZE == 0 and offset < TOTAL and length == min(SIZE, TOTAL - offset)
    if number > 1:
        assert not arrivals.is_due(number, offset, length, TOTAL)
    elif number == 1 and right:
        assert arrivals.is_due(number, offset, length, TOTAL)
    else:
        with pytest.raises(ProtocolError, match="none of the stripes"):
            arrivals.is_due(number, offset, length, TOTAL)


# --- What is right -------------------------------------------------------------------------------


async def test_what_it_says_of_itself(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair(streams=3) as (one, other):
        assert (one.kind, one.peer_id, other.peer_id) == ("tcp", "b", "a")
        assert repr(one) == "<TcpLink to b over 3 connections>"
        await one.aclose()
        assert repr(one) == "<TcpLink to b over 3 connections closed>"


async def test_stripes_over_any_strand_in_any_order(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        await mallory.send(1, mallory.stripe(1, 3), mallory.stripe(1, 1))
        await mallory.send(2, mallory.stripe(2, 2), mallory.stripe(2, 0))
        await mallory.announce()
        assert await receive(link) == PAYLOAD


async def test_stripes_wait_for_their_message(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        await mallory.send(1, *(mallory.stripe(1, index, number=1) for index in range(4)))
        async with trio.open_nursery() as nursery:
            await mallory.announce()
            await mallory.announce()
            got: list[bytes] = []

            async def take() -> None:
                got.extend([await receive(link), await receive(link)])

            nursery.start_soon(take)
            await wait_all_tasks_blocked()
            assert not got
            await mallory.send(2, *(mallory.stripe(2, index) for index in range(4)))
        assert got == [PAYLOAD, PAYLOAD]


async def test_a_small_payload_needs_no_strand(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        await link.send(b"head", (bytes(limits.LINK_INLINE_PAYLOAD_MAX_BYTES),))
        assert link.stats.bytes_sent == HEAD.size + 4 + limits.LINK_INLINE_PAYLOAD_MAX_BYTES + 20
        mallory = Mallory(raw)
        await mallory.send(0, seal(mallory.sealers[0], MESSAGE, head(5) + b"small"))
        assert await receive(link) == b"small"


async def test_both_ends_count_the_same_and_nothing_is_readable(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair(streams=4) as (one, other), trio.open_nursery() as nursery:
        nursery.start_soon(one.send, b"head", (PAYLOAD * 5,))
        assert await receive(other) == PAYLOAD * 5
    assert one.stats.bytes_sent == other.stats.bytes_received > 5 * TOTAL


async def test_nothing_is_readable_on_the_wire(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire(2) as (raw, link), trio.open_nursery() as nursery:
        nursery.start_soon(link.send, b"", (b"secret payload" * 20_000,))
        seen = b""
        while len(seen) < 14 * 20_000:
            seen += await raw[1][0].receive_some()
        assert b"secret" not in seen


async def test_a_strand_that_stalls_does_not_stall_the_others(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire(3) as (raw, link), trio.open_nursery() as nursery:
        nursery.start_soon(link.send, b"", (bytes(64 * limits.MIB),))
        read = [0, 0, 0]

        async def read_all(strand: int) -> None:
            while piece := await raw[strand][0].receive_some(limits.MIB):
                read[strand] += len(piece)

        # Nobody reads from the first strand; the kernels hold some of it.
        nursery.start_soon(read_all, 2)
        await wait_all_tasks_blocked(0.05)
        assert read[2] > 32 * limits.MIB
        nursery.start_soon(read_all, 1)
        await wait_all_tasks_blocked(0.05)
        assert read[1] + read[2] > 64 * limits.MIB
        nursery.cancel_scope.cancel()


async def test_stripes_may_come_byte_by_byte(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire(2) as (raw, link):
        mallory = Mallory(raw)
        stream = b"".join(mallory.stripe(1, index) for index in range(4))
        stream += seal(mallory.sealers[1], STRAND_GOODBYE, b"", (1, 0))
        await mallory.announce()

        async def trickle() -> None:
            cuts = sorted({*range(120), *range(0, len(stream), 7919), *range(len(stream) - 120, len(stream) + 1)})
            cuts = sorted({*cuts, *range(SIZE + 36 - 50, SIZE + 36 + 50)})
            for start, end in pairwise(cuts):
                await raw[1][0].send_all(stream[start:end])
                await wait_all_tasks_blocked()
            await mallory.send(0, seal(mallory.sealers[0], GOODBYE, b""))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            assert await receive(link) == PAYLOAD
            with pytest.raises(LinkClosedError, match="peer mallory closed the link"):
                await link.receive_header()


# --- What is not ---------------------------------------------------------------------------------


async def test_replayed(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        record = mallory.stripe(1, 0)
        await mallory.announce()
        await mallory.announce()
        await mallory.send(2, *(mallory.stripe(2, index) for index in (1, 2, 3)))
        await mallory.send(1, record)
        assert await receive(link) == PAYLOAD
        # For the second message its number is wrong; with a right one it is not what was sealed.
        await mallory.send(1, record[:PREFIX_BYTES] + PLACE.pack(1, 0) + record[PREFIX_BYTES + PLACE.size :])
        await assert_refused(link, AuthenticationError)
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        record = mallory.stripe(1, 0)
        await mallory.announce()
        await mallory.send(1, record, record)
        await assert_refused(link, ProtocolError, "none of the stripes")


async def test_reordered_within_a_strand(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        first, second = mallory.stripe(1, 0), mallory.stripe(1, 1)
        await mallory.announce()
        await mallory.send(1, second, first)
        await assert_refused(link, AuthenticationError)


async def test_left_out(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        mallory.stripe(1, 0)
        await mallory.announce()
        await mallory.send(1, mallory.stripe(1, 1))
        await assert_refused(link, AuthenticationError)


async def test_swapped_between_strands(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        await mallory.announce()
        await mallory.send(2, mallory.stripe(1, 0))
        await assert_refused(link, AuthenticationError)


async def test_reflected(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire(2) as (raw, link), trio.open_nursery() as nursery:
        mallory = Mallory(raw)
        nursery.start_soon(link.send, b"", (PAYLOAD,))
        await mallory.announce()
        echo = b""
        while len(echo) < TOTAL:
            echo += await raw[1][0].receive_some()
        await mallory.send(1, echo)
        await assert_refused(link, AuthenticationError)


@pytest.mark.parametrize("place", [(0, SIZE), (0, 2 * SIZE)])
async def test_a_place_that_was_changed_on_the_way(place: tuple[int, int], striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        record = mallory.stripe(1, 0)
        await mallory.announce()
        await mallory.send(1, record[:PREFIX_BYTES] + PLACE.pack(*place) + record[PREFIX_BYTES + PLACE.size :])
        await assert_refused(link, AuthenticationError)


BAD_STRIPES = {
    "overlapping": (STRIPE, SIZE, (0, SIZE // 2)),
    "beyond the end": (STRIPE, SIZE, (0, 4 * SIZE)),
    "over the end": (STRIPE, SIZE, (0, 3 * SIZE)),
    "far beyond": (STRIPE, SIZE, (0, 2**64 - SIZE)),
    "too short": (STRIPE, SIZE - 1, (0, SIZE)),
    "longer than a stripe": (STRIPE, SIZE + 1, (0, SIZE)),
    "empty": (STRIPE, 0, (0, SIZE)),
    "twice": (STRIPE, SIZE, (0, 0)),
    "of another kind": (MESSAGE, SIZE, (0, SIZE)),
    "goodbye with words": (STRAND_GOODBYE, 5, (0, 0)),
}


@pytest.mark.parametrize("name", BAD_STRIPES)
@pytest.mark.parametrize("discard", [False, True])
async def test_stripes_that_break_the_protocol(name: str, discard: bool, striped_wire: Callable[..., Any]) -> None:
    kind, length, place = BAD_STRIPES[name]
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        await mallory.announce()
        await mallory.send(1, mallory.stripe(1, 0))
        await link.receive_header()
        await link.receive_into((bytearray(SIZE),))
        await mallory.send(2, seal(mallory.sealers[2], kind, bytes(length), place))
        with trio.fail_after(5), pytest.raises(ProtocolError, match="mallory"):
            await (link.discard_payload() if discard else link.receive_into((bytearray(TOTAL - SIZE),)))
        assert link.closed


async def test_a_stripe_of_an_earlier_message(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        for _ in range(2):
            await mallory.announce()
        await mallory.send(1, *(mallory.stripe(1, index) for index in range(4)))
        assert await receive(link) == PAYLOAD
        await mallory.send(2, mallory.stripe(2, 1))
        await assert_refused(link, ProtocolError, "none of the stripes")


async def test_stripes_that_can_never_come(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        await mallory.announce()
        await mallory.send(1, mallory.stripe(1, 0), mallory.stripe(1, 0, number=1))
        await mallory.send(2, seal(mallory.sealers[2], STRAND_GOODBYE, b"", (1, 0)))
        await assert_refused(link, ProtocolError, "did not come")


async def test_a_goodbye_that_was_forged(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        await mallory.announce()
        await mallory.send(1, bytes([STRAND_GOODBYE, 0, 0, 0]) + bytes(16 + 16))
        await assert_refused(link, AuthenticationError)


@pytest.mark.parametrize("cut", [0, 3, 19, 40, SIZE, SIZE + 36 + 5])
async def test_a_strand_lost_inside_a_payload(cut: int, striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        mallory = Mallory(raw)
        await mallory.announce()
        await mallory.send(1, (mallory.stripe(1, 0) + mallory.stripe(1, 1))[:cut])
        await raw[1][0].aclose()
        await assert_refused(link, LinkClosedError, "peer mallory ended.* without a goodbye")


async def test_a_strand_that_is_reset_ends_the_link_at_both_ends(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        raw[1][0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await raw[1][0].aclose()

        async def send() -> None:
            while True:
                await link.send(b"", (PAYLOAD,))

        with trio.fail_after(5), pytest.raises(LinkClosedError, match="one of the connections to peer mallory is gone"):
            await send()
        assert link.closed
        # What the peer sent before can still be received, and it sees the end of the others.
        mallory = Mallory(raw)
        await mallory.send(0, seal(mallory.sealers[0], MESSAGE, head(0, b"last")))
        assert (await link.receive_header())[0] == b"last"
        with trio.fail_after(5):
            for stream, _, _ in (raw[0], raw[2]):
                while await stream.receive_some():
                    pass


@settings(NO_RESET, deadline=None, max_examples=40)
@given(st.integers(0, 5 * 36 + 40), st.binary(max_size=40), st.integers(0, 40), st.booleans())
def test_mutated_strands_raise_nothing_but_protocol_errors(
    striped_wire: Callable[..., Any], start: int, new: bytes, count: int, from_the_end: bool
) -> None:
    async def main() -> None:
        async with striped_wire(2) as (raw, link):
            mallory = Mallory(raw)
            stream = b"".join(mallory.stripe(1, index) for index in range(4))
            stream += seal(mallory.sealers[1], STRAND_GOODBYE, b"", (1, 0))
            at = len(stream) - 36 - start if from_the_end else start
            changed = stream[:at] + new + stream[at + count :]
            await mallory.announce()
            await mallory.send(1, changed)
            await raw[1][0].aclose()
            try:
                with trio.fail_after(5):
                    got = await receive(link)
            except (ProtocolError, LinkClosedError):
                assert link.closed
            else:
                # All four stripes came unchanged: what was changed is behind them.
                assert got == PAYLOAD
                assert changed[: len(stream) - 36] == stream[: len(stream) - 36]

    trio.run(main)


async def test_closing_says_goodbye_on_every_connection(striped_wire: Callable[..., Any]) -> None:
    async with striped_wire() as (raw, link):
        await link.aclose()
        for (stream, _, opener), kind in zip(raw, (GOODBYE, STRAND_GOODBYE, STRAND_GOODBYE), strict=True):
            said = b""
            while piece := await stream.receive_some():
                said += piece
            assert said[:PREFIX_BYTES] == bytes([kind, 0, 0, 0])
            opener.open_into(memoryview(said), memoryview(bytearray()))


async def test_close_in_child(tcp_pair: Callable[..., Any]) -> None:
    async with tcp_pair(streams=3) as (one, _):
        one.close_in_child()
        one.close_in_child()
        assert all(sock.fileno() == -1 for sock in one._sockets())
