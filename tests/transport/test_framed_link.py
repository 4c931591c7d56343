"""Framed links over streams in memory, and bytes of every kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError, ProtocolError
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.fabric.memory import MemoryFabricNetwork
from sparkle_mesh.transport.framed import FramedLink, PeerMoved
from sparkle_mesh.transport.libp2p_stream import open_stream_link
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.tcp import HEAD
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, run_check

GOODBYE = HEAD.pack(2**16 - 1, 0)
MOVED = HEAD.pack(2**16 - 2, 0)


@asynccontextmanager
async def memory_stream_links() -> AsyncIterator[tuple[Link, Link]]:
    network = MemoryFabricNetwork()
    async with network.open() as a, network.open() as b:
        await a.connect(b.peer_id, b.addresses)
        served: list[FabricStream] = []

        async def serve(stream: FabricStream) -> None:
            served.append(stream)

        b.handle("/link", serve)
        stream = await a.open_stream(b.peer_id, "/link")
        await trio.testing.wait_all_tasks_blocked()
        yield await open_stream_link(stream), await open_stream_link(served[0])


@pytest.mark.parametrize("check", LINK_CHECKS, ids=lambda check: check.__name__)
async def test_links_over_streams_in_memory_conform(check: Check) -> None:
    await run_check(check, memory_stream_links)


class GivenBytes:
    """A stream from which given bytes come in given pieces, and then the end."""

    def __init__(self, data: bytes, pieces: Sequence[int] = ()) -> None:
        self.data = data
        self.pieces = list(pieces)
        self.sent = b""
        self.aborted = False

    async def send_all(self, buffers: list[memoryview]) -> None:
        self.sent += b"".join(buffers)

    async def receive_some_into(self, view: memoryview) -> int:
        count = min(len(view), self.pieces.pop(0) if self.pieces else len(self.data), len(self.data))
        view[:count] = self.data[:count]
        self.data = self.data[count:]
        return count

    async def aclose(self) -> None:
        self.aborted = True

    def abort(self) -> None:
        self.aborted = True

    def close_in_child(self) -> None:
        self.aborted = True


def framed(header: bytes, payload: bytes) -> bytes:
    return HEAD.pack(len(header), len(payload)) + header + payload


def receive_all(data: bytes, pieces: Sequence[int] = (), *, may_move: bool = True) -> list[tuple[bytes, bytes]]:
    """Return the messages in ``data``, up to whatever ends them, which must be an error of the two."""
    messages: list[tuple[bytes, bytes]] = []
    stream = GivenBytes(data, pieces)

    async def receive() -> None:
        link = FramedLink(stream, "mallory", kind="test", may_move=may_move)
        while True:
            header, nbytes = await link.receive_header()
            header = bytes(header)
            if nbytes <= 2**20:
                payload = bytearray(nbytes)
                await link.receive_into((payload,))
                messages.append((header, bytes(payload)))
            else:
                # Announced and never allocated.
                await link.discard_payload()

    with pytest.raises((LinkClosedError, ProtocolError, PeerMoved)) as caught:
        trio.run(receive)
    assert stream.aborted or isinstance(caught.value, PeerMoved)
    return messages


MESSAGES = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=6)


@given(MESSAGES, st.lists(st.integers(1, 30), max_size=100), st.sampled_from([b"", GOODBYE, MOVED]))
@settings(deadline=None)
def test_messages_come_out_as_they_went_in_however_they_arrive(
    messages: list[tuple[bytes, bytes]], pieces: list[int], end: bytes
) -> None:
    data = b"".join(framed(*message) for message in messages) + end
    assert receive_all(data) == messages
    assert receive_all(data, pieces) == messages
    assert receive_all(data, [1] * len(data)) == messages


@given(MESSAGES, st.data())
@settings(deadline=None)
def test_changed_bytes_end_in_errors_of_two_types(messages: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    valid = bytearray(b"".join(framed(*message) for message in messages) + GOODBYE)
    start = data.draw(st.integers(0, len(valid)))
    valid[start : start + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    pieces = data.draw(st.lists(st.integers(1, 50), max_size=50))
    whole = sum(start >= len(b"".join(framed(*message) for message in messages[:count])) for count in range(1, 7))
    received = receive_all(bytes(valid), pieces)
    assert received[: min(whole, len(messages))] == messages[: min(whole, len(messages))]


@given(st.binary(max_size=400), st.booleans())
@settings(deadline=None)
def test_garbage_ends_in_errors_of_two_types(data: bytes, may_move: bool) -> None:
    receive_all(data, may_move=may_move)


@pytest.mark.parametrize(
    "after",
    [MOVED, framed(b"more", b""), GOODBYE[:3] + b"x" * 7, GOODBYE + b"x"],
    ids=["moved", "more", "x", "goodbye"],
)
async def test_nothing_may_follow_where_a_peer_has_moved(after: bytes) -> None:
    at_once = FramedLink(GivenBytes(MOVED + after), "mallory", kind="test", may_move=True)
    with pytest.raises(ProtocolError, match="sent more where it had moved"):
        await at_once.receive_header()
    later = FramedLink(GivenBytes(MOVED + after, [len(MOVED)]), "mallory", kind="test", may_move=True)
    with pytest.raises(PeerMoved):
        await later.receive_header()
    with pytest.raises(LinkClosedError if after.startswith(GOODBYE) else ProtocolError):
        await later.receive_header()
    assert later.closed


async def test_a_goodbye_may_follow_where_a_peer_has_moved() -> None:
    for cut in range(len(GOODBYE) + 1):
        link = FramedLink(GivenBytes(MOVED + GOODBYE, [len(MOVED) + cut]), "peer", kind="test", may_move=True)
        with pytest.raises(PeerMoved):
            await link.receive_header()
        with pytest.raises(LinkClosedError, match="closed the link"):
            await link.receive_header()


async def test_links_that_may_not_move_refuse_it() -> None:
    link = FramedLink(GivenBytes(MOVED), "mallory", kind="test")
    with pytest.raises(ProtocolError, match="header of 65534 bytes"):
        await link.receive_header()


async def test_a_large_announcement_allocates_nothing() -> None:
    stream = GivenBytes(HEAD.pack(0, limits.LINK_PAYLOAD_MAX_BYTES) + bytes(1000))
    link = FramedLink(stream, "mallory", kind="test")
    assert (await link.receive_header())[1] == limits.LINK_PAYLOAD_MAX_BYTES
    with pytest.raises(LinkClosedError, match="in the middle of a message"):
        await link.discard_payload()
