"""What links refuse, one test each: records and connections that the network or another process made or changed."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.errors import AuthenticationError, LinkClosedError, ProtocolError, UnreachableError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.transport.arena import Arena, has_sealed_files
from sparkle_mesh.transport.ciphers import CIPHERS
from sparkle_mesh.transport.connector import LINK_PROTOCOL, LinkConnector
from sparkle_mesh.transport.handshake import (
    OPENING_BYTES,
    SHARED_MEMORY,
    TCP,
    WELCOME_BYTES,
    LinkAnswer,
    LinkKeys,
    LinkOffer,
    LinkRefusal,
)
from sparkle_mesh.transport.local_sockets import LocalListener, connect_local, send_descriptors
from sparkle_mesh.transport.records import RecordOpener, RecordSealer
from sparkle_mesh.transport.shared_memory import SharedMemory
from sparkle_mesh.transport.tcp import GOODBYE, HEAD, MESSAGE, PAYLOAD, TcpLink

needs_shared_memory = pytest.mark.skipif(not has_sealed_files(), reason="memory files are Linux's own")
THERE, BACK, WRONG = b"t" * 32, b"b" * 32, b"w" * 32


# --- Records over TCP ------------------------------------------------------------------------------


def sealed(cipher: str, key: bytes = THERE) -> list[bytes]:
    """Return a stream's records: three messages, the second with a payload of two records, and a goodbye."""
    sealer = RecordSealer(cipher, key)
    records = []
    for kind, plaintext in (
        (MESSAGE, HEAD.pack(5, 0) + b"first"),
        (MESSAGE, HEAD.pack(6, 40) + b"second"),
        (PAYLOAD, b"x" * 20),
        (PAYLOAD, b"y" * 20),
        (MESSAGE, HEAD.pack(5, 0) + b"third"),
        (GOODBYE, b""),
    ):
        out = bytearray(len(plaintext) + sealer.overhead_bytes)
        sealer.seal_into(kind, plaintext, memoryview(out))
        records.append(bytes(out))
    return records


async def receive_all(link: TcpLink, got: list[bytes]) -> None:
    """Receive headers, and payloads by the record, into ``got`` until the link ends."""
    while True:
        header, left = await link.receive_header()
        got.append(bytes(header))
        while left:
            part = bytearray(20)
            await link.receive_into((part,))
            got.append(bytes(part))
            left -= 20


Delivered = Callable[..., Any]


@pytest.fixture(params=CIPHERS)
def delivered(request: pytest.FixtureRequest, stream_pair: Callable[..., Any]) -> Delivered:
    """Send what ``change`` makes of a stream's records; return what the link delivered, and how it ended."""
    cipher = request.param

    async def deliver(
        change: Callable[[list[bytes]], Sequence[bytes]], key: bytes = THERE
    ) -> tuple[list[bytes], ProtocolError | LinkClosedError]:
        async with stream_pair() as (raw, stream):
            link = TcpLink(stream, "mallory", RecordSealer(cipher, BACK), RecordOpener(cipher, THERE))
            await raw.send_all(b"".join(change(sealed(cipher, key))))
            await raw.send_eof()
            got: list[bytes] = []
            with pytest.raises((ProtocolError, LinkClosedError)) as caught:
                await receive_all(link, got)
            assert link.closed
            with pytest.raises(LinkClosedError):
                await link.receive_header()
            return got, caught.value

    return deliver


async def test_records_as_they_were_sealed_are_taken(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: records)
    assert got == [b"first", b"second", b"x" * 20, b"y" * 20, b"third"]
    assert str(error) == "peer mallory closed the link"


async def test_records_under_a_wrong_key_are_refused(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: records, key=WRONG)
    assert got == []
    assert isinstance(error, AuthenticationError)


async def test_a_replayed_message_is_refused(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: [records[0], *records])
    assert got == [b"first"]
    assert isinstance(error, AuthenticationError)


async def test_a_replayed_payload_is_refused(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: [*records[:3], records[2], *records[4:]])
    assert got == [b"first", b"second", b"x" * 20]
    assert isinstance(error, AuthenticationError)


async def test_a_replayed_stream_is_refused(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: [*records[:-1], *records])
    assert got == [b"first", b"second", b"x" * 20, b"y" * 20, b"third"]
    assert isinstance(error, AuthenticationError)


async def test_reordered_payloads_are_refused(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: [*records[:2], records[3], records[2], *records[4:]])
    assert got == [b"first", b"second"]
    assert isinstance(error, AuthenticationError)


async def test_reordered_messages_are_refused(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: [records[4], *records[1:4], records[0], records[5]])
    assert got == []
    assert isinstance(error, AuthenticationError)


async def test_a_record_left_out_is_noticed(delivered: Delivered) -> None:
    got, error = await delivered(lambda records: records[1:])
    assert got == []
    assert isinstance(error, AuthenticationError)


async def test_a_truncated_record_is_refused(delivered: Delivered) -> None:
    # What follows moves up, and is read as the rest of it.
    got, error = await delivered(lambda records: [records[0], records[1][:-1], *records[2:]])
    assert got == [b"first"]
    assert isinstance(error, AuthenticationError)


@pytest.mark.parametrize("count", range(6))
async def test_a_truncated_stream_is_no_end(count: int, delivered: Delivered) -> None:
    got, error = await delivered(lambda records: records[:count])
    assert got == [b"first", b"second", b"x" * 20, b"y" * 20, b"third"][:count]
    assert isinstance(error, LinkClosedError)
    assert "without a goodbye" in str(error)


@pytest.mark.parametrize("cipher", CIPHERS)
async def test_a_reflected_record_is_refused(cipher: str, stream_pair: Callable[..., Any]) -> None:
    async with stream_pair() as (raw, stream):
        link = TcpLink(stream, "mallory", RecordSealer(cipher, BACK), RecordOpener(cipher, THERE))
        await link.send(b"boomerang")
        await raw.send_all(await raw.receive_some())
        with pytest.raises(AuthenticationError, match="did not verify"):
            await link.receive_header()
        assert link.closed


# --- Connections for shared memory -----------------------------------------------------------------


@dataclass
class HalfOpened:
    """A link that two connectors have agreed on, by hand at the dialing end: only the connection is missing."""

    one: LinkConnector
    other: LinkConnector
    stream: FabricStream
    offer: LinkOffer
    answer: LinkAnswer
    keys: LinkKeys


@asynccontextmanager
async def half_opened(open_fabrics: Callable[..., Any], kind: str) -> AsyncIterator[HalfOpened]:
    """Agree on a link of this kind; ``other`` waits for its connection meanwhile."""

    def make(fabric: Any) -> LinkConnector:
        return LinkConnector(fabric, mesh_id=bytes(32), authorize=lambda _: True, kinds=[kind])

    async with open_fabrics() as (a, b), make(a) as one, make(b) as other, trio.open_nursery() as nursery:
        nursery.start_soon(other.connect, a.peer_id)
        await wait_all_tasks_blocked()
        stream = await a.open_stream(b.peer_id, LINK_PROTOCOL)
        offer = one._party.offer((), SYSTEM_ENTROPY)
        await send_message(stream, offer)
        answer = await receive_message(stream, LinkAnswer)
        yield HalfOpened(one, other, stream, offer, answer, one._party.accept(offer, answer, b.peer_id))
        nursery.cancel_scope.cancel()


@needs_shared_memory
async def test_a_local_connection_with_a_wrong_proof_is_refused(open_fabrics: Callable[..., Any]) -> None:
    async with half_opened(open_fabrics, SHARED_MEMORY) as half:
        other, answer, keys = half.other, half.answer, half.keys
        wrong = bytearray(keys.opening(0))
        wrong[-1] ^= 1
        for opening in (wrong, keys.opening(1), bytes(OPENING_BYTES)):
            sock = await connect_local(answer.local_address)
            await sock.send(opening)
            assert await sock.recv(1) == b""
            sock.close()
        assert not other.links
        # None of them has used up the place of the right one.
        sock = await connect_local(answer.local_address)
        await sock.send(keys.opening(0))
        assert await sock.recv(WELCOME_BYTES) == keys.welcome(0)
        sock.close()


@needs_shared_memory
async def test_a_local_listener_with_a_wrong_proof_is_refused(open_fabrics: Callable[..., Any]) -> None:
    async with half_opened(open_fabrics, SHARED_MEMORY) as half, LocalListener(SYSTEM_ENTROPY) as impostor:
        answer = LinkAnswer(
            version=1,
            secret=bytes(32),
            cipher=half.keys.cipher,
            host_id=bytes(16),
            kinds=(SHARED_MEMORY,),
            local_address=impostor.address,
        )

        async def welcome() -> None:
            sock = await impostor.accept()
            await sock.recv(OPENING_BYTES)
            await sock.send(bytes(32))
            # It is neither sent a descriptor nor anything else.
            assert await sock.recv(1) == b""
            sock.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(welcome)
            with pytest.raises(UnreachableError, match="does not hold the keys"):
                await half.one._data.reach("mallory", answer, half.keys, set())


@needs_shared_memory
@pytest.mark.parametrize(
    "address", ["", "@", "/tmp/socket", "@sparkle-", f"@sparkle-{'0' * 33}", f"@other---{'0' * 32}", "\0", "é" * 255]
)
async def test_a_local_address_that_is_no_links_is_not_connected_to(address: str) -> None:
    with pytest.raises(ProtocolError, match="is none"):
        await connect_local(address)


def connect_as_another_user(address: str) -> tuple[int, int]:
    """Fork; return the child's id, and a pipe that tells what became of its connection."""
    told_read, told_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(20)
            sock.connect(f"\0{address[1:]}")
            os.write(told_write, b"connected and " + (sock.recv(1) or b"closed"))
        finally:
            os._exit(0)
    os.close(told_write)
    return child, told_read


def reap(child: int, pipe: int) -> None:
    """Let go of what :func:`connect_as_another_user` returned."""
    os.close(pipe)
    os.waitpid(child, 0)


@needs_shared_memory
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
async def test_a_local_connection_of_another_user_is_refused() -> None:
    async with LocalListener(SYSTEM_ENTROPY) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(listener.accept)
        child, pipe = connect_as_another_user(listener.address)
        await trio.lowlevel.wait_readable(pipe)
        told = os.read(pipe, 100)
        reap(child, pipe)
        assert told == b"connected and closed"
        nursery.cancel_scope.cancel()


def memory_file(nbytes: int, seals: int) -> int:
    """Return the descriptor of a file in memory that begins as an arena does."""
    import fcntl

    arena = Arena(SYSTEM_ENTROPY, 2**20)
    first_page = bytes(arena._map[:64])
    arena.close()
    descriptor = os.memfd_create("not sparkle", os.MFD_ALLOW_SEALING)
    os.write(descriptor, first_page)
    os.ftruncate(descriptor, nbytes)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def descriptor_count() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


SHRINK, GROW, WRITE = 0x2, 0x4, 0x8


@needs_shared_memory
@pytest.mark.parametrize(
    ("nbytes", "seals"),
    [
        pytest.param(2**20, 0, id="unsealed"),
        pytest.param(2**20, GROW | WRITE, id="sealed, but not against shrinking"),
        pytest.param(64, SHRINK | GROW, id="shrunk to its first bytes"),
        pytest.param(4096, SHRINK | GROW, id="shrunk to its first page"),
        pytest.param(0, SHRINK | GROW, id="shrunk to nothing"),
    ],
)
async def test_an_arena_that_could_end_under_its_reader_is_refused(nbytes: int, seals: int) -> None:
    one, other = trio.socket.socketpair()
    memory = SharedMemory(SYSTEM_ENTROPY)
    arena = memory_file(nbytes, seals)
    bell = os.eventfd(0)
    before = descriptor_count()
    await send_descriptors(one, [arena, bell])
    with pytest.raises(ProtocolError, match="is not to be used"):
        await memory.share(trio.SocketStream(other), "mallory")
    assert descriptor_count() == before
    for descriptor in (arena, bell):
        os.close(descriptor)
    one.close()
    other.close()
    memory.close()


@needs_shared_memory
async def test_an_arena_cannot_be_shrunk_by_those_who_read_it() -> None:
    arena = Arena(SYSTEM_ENTROPY, 2**20)
    descriptor = arena.open_for_reading()
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(descriptor, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(arena._fd, 4096)
    os.close(descriptor)
    arena.close()


# --- Answers and reports over the control plane ----------------------------------------------------


async def test_an_answer_with_addresses_that_are_none_does_not_end_the_connector(
    open_fabrics: Callable[..., Any],
) -> None:
    addresses = ("/ip6/fe80::1%\0/tcp/1", f"/ip6/fe80::1%{'x' * 100}/tcp/1", "/ip6/fe80::1%é/tcp/1")
    async with half_opened(open_fabrics, TCP) as half:
        answer = msgspec.structs.replace(half.answer, addresses=addresses)
        with pytest.raises(UnreachableError, match="it gave no address"):
            await half.one._data.reach("mallory", answer, half.keys, set())


async def test_a_link_id_in_use_is_refused_while_its_link_is_being_made(open_fabrics: Callable[..., Any]) -> None:
    async with half_opened(open_fabrics, TCP) as half:
        fabric, other_id = half.one._fabric, half.other._fabric.peer_id
        # As it is once the connection has come, and the link is not there yet.
        half.other._pending.discard(half.offer.link_id)
        stream = await fabric.open_stream(other_id, LINK_PROTOCOL)
        await send_message(stream, half.offer)
        assert (await receive_message(stream, LinkRefusal)).reason == "the link id is in use"
        assert half.offer.link_id in half.other._expected


@pytest.mark.parametrize("report", [b"\0\0\0\1\xc1", b"\xff\xff\xff\xff", b"\0\0\0\1\x80"])
async def test_a_garbled_report_counts_as_a_failed_connection(report: bytes, open_fabrics: Callable[..., Any]) -> None:
    async with half_opened(open_fabrics, TCP) as half:
        (expected,) = half.other._expected.values()
        await half.stream.write(report)
        await wait_all_tasks_blocked()
        assert not half.other._expected
        assert re.search("not a valid|announced", expected.attempt.last_failure)
        # It still wants a link, and gets one.
        assert not expected.attempt.done.is_set()
        await half.one.connect(half.other._fabric.peer_id)
        assert expected.attempt.done.is_set()
