"""Links over shared memory: they conform, and what peers share is bounded by what they may do with it."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.errors import AuthenticationError, LinkClosedError, ProtocolError
from sparkle_mesh.transport import local_sockets
from sparkle_mesh.transport.arena import Arena, PeerArena, has_sealed_files
from sparkle_mesh.transport.cross_memory import can_read, read_memory
from sparkle_mesh.transport.framed import FramedLink
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.local_sockets import LocalListener, connect_local, send_descriptors
from sparkle_mesh.transport.shared_memory import SharedMemory, SharedMemoryLink, SocketBytes
from sparkle_mesh.transport.tcp import HEAD
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, run_check

pytestmark = pytest.mark.skipif(not has_sealed_files(), reason="memory files are Linux's own")


def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = trio.socket.socketpair()
    return trio.SocketStream(one), trio.SocketStream(other)


@asynccontextmanager
async def shared_pair() -> AsyncIterator[tuple[SharedMemoryLink, SharedMemoryLink]]:
    mine, theirs = SharedMemory(SYSTEM_ENTROPY), SharedMemory(SYSTEM_ENTROPY)
    one, other = socket_pair()
    links: dict[str, SharedMemoryLink] = {}

    async def share(memory: SharedMemory, stream: trio.SocketStream, peer: str) -> None:
        links[peer] = await memory.share(stream, peer)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(share, mine, one, "b")
        nursery.start_soon(share, theirs, other, "a")
    try:
        yield links["b"], links["a"]
    finally:
        for link in links.values():
            await link.aclose()
        mine.close()
        theirs.close()


@pytest.mark.parametrize("check", LINK_CHECKS, ids=lambda check: check.__name__)
async def test_links_conform(check: Check) -> None:
    await run_check(check, shared_pair)


async def test_framed_links_that_break_the_protocol_are_closed() -> None:
    for garbage in (HEAD.pack(2**15, 0), HEAD.pack(3, 2**50) + b"abc", HEAD.pack(2**16 - 1, 1)):
        raw, stream = socket_pair()
        link = FramedLink(SocketBytes(stream), "mallory", kind="test")
        await raw.send_all(garbage)
        with pytest.raises(ProtocolError, match="mallory broke the protocol"):
            await link.receive_header()
        assert link.closed
        await raw.aclose()


async def test_framed_links_tell_a_lost_connection_from_a_closed_one() -> None:
    for said, match in ((b"", "ended without a goodbye"), (HEAD.pack(4, 0) + b"x", "in the middle of a message")):
        raw, stream = socket_pair()
        link = FramedLink(SocketBytes(stream), "peer", kind="test")
        await raw.send_all(said)
        await raw.aclose()
        with pytest.raises(LinkClosedError, match=match):
            await link.receive_header()


def test_an_arena_is_read_and_never_written_by_others() -> None:
    arena = Arena(SYSTEM_ENTROPY, 2**20)
    descriptor = arena.open_for_reading()
    peer = PeerArena(descriptor)
    mine = arena.allocate(100)
    mine[:5] = list(b"there")
    offset = arena.offset_of(mine)
    assert offset is not None
    theirs = peer.view(offset, 5)
    assert bytes(theirs) == b"there"
    with pytest.raises(TypeError):
        theirs[:1] = b"x"
    with pytest.raises(OSError, match="Bad file"):
        os.write(descriptor, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(arena._fd, 2**19)
    for start, nbytes in ((-1, 5), (2**20 - 4, 5), (0, 2**21), (5, -6)):
        with pytest.raises(ProtocolError, match="not in a peer's shared memory"):
            peer.view(start, nbytes)
    assert arena.offset_of(np.zeros(4)) is None
    os.close(descriptor)
    theirs.release()
    peer.close()
    arena.close()
    arena.close()
    mine[0] = 1  # its owner's arrays stay usable


def test_memory_of_an_arena_is_taken_back() -> None:
    arena = Arena(SYSTEM_ENTROPY, 2**20)
    room = arena._free[0][1]
    arrays = [arena.allocate(nbytes) for nbytes in (1, 5000, 4096, 70000)]
    assert len({array.__array_interface__["data"][0] for array in arrays}) == 4
    kept = arrays[1][100:200]
    with pytest.raises(MemoryError, match="not left of 1048576"):
        arena.allocate(2**20)
    del arrays
    gc.collect()
    assert len(arena._returned) == 3
    small = arena.allocate(1)
    # What lies behind the one that is kept is one stretch again; the first page is taken.
    assert arena._free == [(arena.nbytes - room + 3 * 4096, room - 3 * 4096)]
    del small
    del kept
    gc.collect()
    again = arena.allocate(room)
    assert not again.any()
    assert arena._free == []
    arena.close()


def test_what_is_no_arena_is_refused() -> None:
    memory = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 2**20)
    with pytest.raises(ProtocolError, match="is not to be used"):
        PeerArena(memory)  # its owner could cut it short, and kill whoever reads it
    read, write = os.pipe()
    with pytest.raises(ProtocolError, match="is none"):
        PeerArena(read)
    import fcntl

    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, 2)
    with pytest.raises(ProtocolError, match="begins with"):
        PeerArena(memory)
    for descriptor in (memory, read, write):
        os.close(descriptor)


async def test_descriptors_that_do_not_belong_are_refused() -> None:
    for number in (0, 1, 3):
        one, other = trio.socket.socketpair()
        memory = SharedMemory(SYSTEM_ENTROPY)
        if number:
            await send_descriptors(one, [sys.stderr.fileno()] * number)
        else:
            await one.send(b"\0")
        with pytest.raises(ProtocolError, match="descriptors came"):
            await memory.share(trio.SocketStream(other), "mallory")
        one.close()
        other.close()
        memory.close()


async def test_a_bell_that_is_none_is_refused() -> None:
    one, other = trio.socket.socketpair()
    memory = SharedMemory(SYSTEM_ENTROPY)
    arena = memory.arena.open_for_reading()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    await send_descriptors(one, [arena, arena])
    with pytest.raises(ProtocolError, match="as its bell"):
        await memory.share(trio.SocketStream(other), "mallory")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    os.close(arena)
    one.close()
    other.close()
    memory.close()
    memory.close()


async def test_rings_wake_the_peer() -> None:
    async with shared_pair() as (one, _other):
        memory = SharedMemory(SYSTEM_ENTROPY)
        memory.quiet()
        memory.ring_own_bell()
        await trio.lowlevel.wait_readable(memory.bell)
        memory.quiet()
        with trio.move_on_after(0.01) as scope:
            await trio.lowlevel.wait_readable(memory.bell)
        assert scope.cancelled_caught
        memory.close()
        assert one.memory.readable
        one.memory.ring()
        await one.aclose()
        one.memory.ring()  # nobody is there: nothing happens


def test_other_memory_is_read_where_it_is() -> None:
    data = np.arange(100, dtype=np.float32)
    out = np.empty_like(data)
    address = data.__array_interface__["data"][0]
    read_memory(os.getpid(), address, out)
    np.testing.assert_array_equal(out, data)
    assert can_read(os.getpid(), address, data.tobytes())
    assert not can_read(os.getpid(), address, bytes(400))
    assert not can_read(os.getpid(), 8, bytes(4))
    for nowhere in (0, 8, 2**64):
        with pytest.raises(LinkClosedError, match="cannot be read"):
            read_memory(os.getpid(), nowhere, out)
    with pytest.raises(LinkClosedError, match="No such process"):
        read_memory(2**22 - 1, address, out)


async def test_local_sockets_are_for_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    async with LocalListener(SYSTEM_ENTROPY) as listener, trio.open_nursery() as nursery:
        sock = await connect_local(listener.address)
        accepted = await listener.accept()
        assert local_sockets.peer_process(accepted) == os.getpid()
        sock.close()
        accepted.close()

        # Another user's connection is closed, another user's listener is not spoken to.
        nursery.start_soon(listener.accept)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(AuthenticationError, match="another user"):
            await connect_local(listener.address)
        raw = trio.socket.socket(socket.AF_UNIX)
        await raw.connect("\0" + listener.address[1:])
        assert await raw.recv(1) == b""
        raw.close()
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match="refused"):
        await connect_local(listener.address)


def is_link(link: Link) -> bool:
    return isinstance(link, SharedMemoryLink) and link.kind == "shared_memory"


async def test_kind_and_representation() -> None:
    async with shared_pair() as (one, _):
        assert is_link(one)
        assert repr(one) == "<SharedMemoryLink (shared_memory) to b>"
        await one.aclose()
        assert repr(one).endswith("closed>")


ELSEWHERE = """
import os, sys
import numpy as np, trio
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.transport import arena, shared_memory
arena.has_sealed_files = lambda: False
shared_memory._has_event_descriptors = lambda: False
sys.path.insert(0, sys.argv[1])
import test_shared_memory_link as tests
from sparkle_mesh.transport.testing import check_link


async def main():
    arena.Arena.__init__.__defaults__ = (2**24,)
    await check_link(tests.shared_pair)
    async with tests.shared_pair() as (one, other):
        memory = shared_memory.SharedMemory(SYSTEM_ENTROPY)
        memory.ring_own_bell()
        memory.ring_own_bell()
        await trio.lowlevel.wait_readable(memory.bell)
        memory.quiet()
        with trio.move_on_after(0.01) as scope:
            await trio.lowlevel.wait_readable(memory.bell)
        assert scope.cancelled_caught
        array = memory.arena.allocate(5000)
        array[:] = 7
        del array
        assert not memory.arena.allocate(5000).any()
        memory.close()
        read, write = os.pipe()
        shared_memory._check_bell(write)
        for descriptor in (read, write):
            os.close(descriptor)
        try:
            shared_memory._check_bell(0 if os.isatty(0) else os.open("/dev/null", os.O_RDONLY))
        except arena.ProtocolError as error:
            print(error)
    print([name for name in os.listdir("/dev/shm") if name.startswith("psm_")])


trio.run(main)
"""


def test_what_other_systems_have_conforms_too(tmp_path: Path) -> None:
    """Segments of the standard library and pipes as bells, in a process of its own: the former starts another."""
    folder = str(Path(__file__).resolve().parent)
    before = sorted(path.name for path in Path("/dev/shm").glob("psm_*"))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, folder], capture_output=True, text=True, timeout=50, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    refused, left = done.stdout.splitlines()
    assert "as its bell" in refused
    assert left == str(before)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:sparkle")


def test_a_closed_arena_is_mapped_for_as_long_as_its_arrays() -> None:
    before = mappings()
    arena = Arena(SYSTEM_ENTROPY, 2**20)
    array = arena.allocate(100)
    arena.close()
    assert mappings() == before + 1
    array[:] = 1
    del array, arena
    assert mappings() == before
    unused = Arena(SYSTEM_ENTROPY, 2**20)
    unused.close()
    assert mappings() == before
