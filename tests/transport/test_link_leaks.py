"""A process that connects and disconnects a thousand times keeps nothing of it, however its peers go."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError
from sparkle_mesh.transport.attempts import Attempt
from sparkle_mesh.transport.connector import LinkConnector, _Expected
from sparkle_mesh.transport.handshake import LINK_KINDS, SHARED_MEMORY, TCP
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.shared_memory import SharedMemoryLink

FOLDER = Path(__file__).parent
ORDERLY_COUNT = 900
KILLED_COUNT = 100
# Kinds whose connections need no control plane, so that a peer can be forked and killed within milliseconds.
KILLED_KINDS = (SHARED_MEMORY, TCP)
NOTICED_WITHIN_S = 1.0

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")


class DyingPeers:
    """The process that forks peers which only a SIGKILL ends."""

    def __init__(self) -> None:
        command = [sys.executable, str(FOLDER / "dying_peers.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, **wanted: Any) -> int:
        """Fork one; return its process id."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(wanted), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def end(self) -> None:
        """End it, and wait until all of its peers have ended."""
        self._process.communicate(timeout=30)


@pytest.fixture
def dying_peers() -> Iterator[DyingPeers]:
    peers = DyingPeers()
    yield peers
    peers.end()


@pytest.fixture
def link_keys(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The keys of a dying peer's link, by its number."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("dying_peers").link_keys


@dataclass(frozen=True)
class Held:
    """What this process holds, and what there is on this machine that only links could have made."""

    descriptors: Counter[str]
    threads: frozenset[str]
    other_threads: frozenset[str]
    tasks: int
    arenas: int
    segments: frozenset[str]

    @staticmethod
    def now() -> Held:
        """Look."""
        gc.collect()
        threads = threading.enumerate()
        # trio keeps idle worker threads (it resolves names in them) for a while.
        lasting = frozenset(thread.name for thread in threads if not re.fullmatch(r"Trio thread \d+", thread.name))
        ids = frozenset(task.name for task in Path("/proc/self/task").iterdir())
        return Held(
            Counter(re.sub(r"\d+", "", target) for target in descriptor_targets()),
            lasting,
            ids - {str(thread.native_id) for thread in threads},
            trio.lowlevel.current_statistics().tasks_living,
            Path("/proc/self/maps").read_text().count("memfd:sparkle"),
            frozenset(path.name for path in Path("/dev/shm").glob("*sparkle*")),
        )


def descriptor_targets() -> Iterator[str]:
    """Yield what this process's descriptors are of."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            yield str(descriptor.readlink())
        except FileNotFoundError:
            continue  # the listing's own descriptor


def local_names() -> str:
    """Return the kernel's list of local sockets."""
    return Path("/proc/net/unix").read_text()


# --- Peers that go in order ------------------------------------------------------------------------


async def connect_both(one: LinkConnector, other: LinkConnector) -> tuple[Link, Link]:
    links: dict[LinkConnector, Link] = {}

    async def connect(mine: LinkConnector, peer: LinkConnector) -> None:
        links[mine] = await mine.connect(peer._fabric.peer_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect, one, other)
        nursery.start_soon(connect, other, one)
    return links[one], links[other]


async def expect_end(link: Link) -> None:
    """Receive until the link ends."""
    with pytest.raises(LinkClosedError):
        await drain(link)
    await link.aclose()


async def drain(link: Link) -> None:
    while True:
        await link.discard_payload()
        await link.receive_header()


async def connect_and_part(one: LinkConnector, other: LinkConnector, number: int) -> None:
    """Connect, talk, and end the link in one of the ways in which links end."""
    link, peer_link = await connect_both(one, other)
    await link.send(b"hello", (bytes(100),))
    assert (await peer_link.receive_header())[0] == b"hello"
    await peer_link.discard_payload()
    if number % 2:
        link, peer_link = peer_link, link
    if number % 3 == 0:
        # In the middle of a message that the peer does not take.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send_until_closed, link)
            await wait_all_tasks_blocked()
            await peer_link.aclose()
    elif number % 3 == 1:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.aclose)
            nursery.start_soon(peer_link.aclose)
    else:
        await link.aclose()
    await expect_end(link)
    await expect_end(peer_link)


async def _send_until_closed(link: Link) -> None:
    payload = bytes(4 * limits.MIB)
    with suppress(LinkClosedError):
        while True:
            await link.send(b"", (payload,))
    assert link.closed


# --- Peers that are killed -------------------------------------------------------------------------


async def connect_and_kill(survivor: LinkConnector, peers: DyingPeers, kind: str, number: int, keys: Any) -> str:
    """Let a peer connect, kill it while both talk, and see both directions end; return where it could be met."""
    peer_id = f"dying-{number}"
    attempt = Attempt()
    # As if it had offered the link over the control plane.
    survivor._pending.add(keys, peer_id, trio.current_time())
    survivor._expected[keys.link_id] = _Expected(peer_id, attempt, trio.Event())
    local_address = survivor.memory.address if survivor.memory else ""
    pid = peers.start(kind=kind, number=number, addresses=survivor._fabric.addresses, local_address=local_address)
    with trio.fail_after(30):
        await attempt.done.wait()
        del survivor._expected[keys.link_id]
        link = attempt.link
        assert link is not None
        assert link.kind == kind
        name = bytes((await link.receive_header())[0]).decode()
        assert (await link.receive_header())[1] > limits.MIB
        await link.receive_into((bytearray(100_000),))
    board = link.memory.arena.board if isinstance(link, SharedMemoryLink) else None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send_until_closed, link)
        await wait_all_tasks_blocked()
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(NOTICED_WITHIN_S):
            await expect_end(link)
    # What a peer had written can be read after its death, and is let go of with the last that looks at it.
    assert board is None or bytes(board) == bytes(limits.ARENA_BOARD_BYTES)
    return name


# --- All of it -------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
async def test_a_thousand_links_a_hundred_of_them_to_the_killed_leave_nothing(
    open_fabrics: Callable[..., Any], dying_peers: DyingPeers, link_keys: Any
) -> None:
    met: list[str] = []
    async with AsyncExitStack() as stack:
        pairs: dict[str, tuple[LinkConnector, LinkConnector]] = {}
        for kind in LINK_KINDS:
            fabrics = await stack.enter_async_context(open_fabrics())
            pair = [
                LinkConnector(fabric, mesh_id=bytes(32), authorize=lambda _: True, kinds=[kind]) for fabric in fabrics
            ]
            one, other = [await stack.enter_async_context(each) for each in pair]
            pairs[kind] = one, other
            met += [each.memory.address for each in pair if each.memory]

        async def go(orderly: range, killed: range) -> None:
            for number in orderly:
                kind = LINK_KINDS[number % len(LINK_KINDS)]
                await connect_and_part(*pairs[kind], number // len(LINK_KINDS))
            for number in killed:
                kind = KILLED_KINDS[number % len(KILLED_KINDS)]
                survivor = pairs[kind][0]
                met.append(await connect_and_kill(survivor, dying_peers, kind, number, link_keys(number)))
            await wait_all_tasks_blocked()

        # What is made once and kept is there after a few.
        await go(range(12), range(4))
        before = Held.now()
        await go(range(ORDERLY_COUNT), range(1000, 1000 + KILLED_COUNT))
        assert Held.now() == before
        for connector in (each for pair in pairs.values() for each in pair):
            assert not connector.links
            assert not connector._attempts
            assert not connector._expected
            assert len(connector._pending) == 0
    dying_peers.end()
    names = local_names()
    assert [name for name in met if name and name[1:] in names] == []
