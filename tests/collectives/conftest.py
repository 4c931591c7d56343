"""Groups of ranks in one process, over in-memory links that can be cut at a chosen message."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.async_collectives import AsyncCollectives
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.collectives.shared_plan import plan_chunks, work_bytes
from sparkle_mesh.errors import LinkClosedError, UsageError
from sparkle_mesh.transport.buffers import byte_views
from sparkle_mesh.transport.link import Buffer, Link, LinkStats
from sparkle_mesh.transport.memory import memory_link_pair
from sparkle_mesh.transport.shared_memory import SharedMemory

LINEAGE = b"L" * 32


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut vectors into small segments, and what is received at a time so small that segments have several parts."""
    monkeypatch.setattr(limits, "COLLECTIVE_PART_BYTES", 1024)
    monkeypatch.setattr(limits, "COLLECTIVE_SEGMENT_MIN_BYTES", 16 * limits.KIB)


class PairLink(Link):
    """One end of a rendezvous link: a send returns when the other end has taken the message."""

    kind = "pair"

    def __init__(
        self,
        peer_id: str,
        outgoing: trio.MemorySendChannel[tuple[bytes, bytes]],
        incoming: trio.MemoryReceiveChannel[tuple[bytes, bytes]],
        delay_s: float,
    ) -> None:
        self.peer_id = peer_id
        self._stats = LinkStats()
        #: Cut the link instead of sending this many-th message.
        self.cut_at: int | None = None
        #: Keep a send from returning for so long after its message has arrived.
        self.linger_s = 0.0
        #: Called with each message's header before it is sent.
        self.spy: Callable[[bytes], None] | None = None
        #: Changes a payload on its way.
        self.tamper: Callable[[bytes, bytes], bytes] | None = None
        self._outgoing = outgoing
        self._incoming = incoming
        self._delay_s = delay_s
        self._payload = b""
        self._closed = False
        self._lock = trio.StrictFIFOLock()

    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        async with self._lock:
            payload = b"".join(bytes(view) for view in byte_views(buffers)[0])
            if self.spy is not None:
                self.spy(bytes(header))
            if self.tamper is not None:
                payload = self.tamper(bytes(header), payload)
            if self.stats.messages_sent == self.cut_at:
                await self.aclose()
            self.stats.messages_sent += 1
            if self._delay_s:
                await trio.sleep(self._delay_s)
            try:
                await self._outgoing.send((bytes(header), payload))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise LinkClosedError("the link is closed") from error
            if self.linger_s:
                await trio.sleep(self.linger_s)

    async def receive_header(self) -> tuple[memoryview, int]:
        try:
            header, self._payload = await self._incoming.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise LinkClosedError("the link has ended") from error
        return memoryview(header), len(self._payload)

    async def receive_into(self, buffers: Sequence[Buffer]) -> None:
        await trio.lowlevel.checkpoint()
        views, _ = byte_views(buffers, writable=True)
        if sum(len(view) for view in views) > len(self._payload):
            raise UsageError("more than what is left")
        for view in views:
            view[:], self._payload = self._payload[: len(view)], self._payload[len(view) :]

    async def discard_payload(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self._closed = True
        self._outgoing.close()
        self._incoming.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def close_in_child(self) -> None:
        raise NotImplementedError


def pair_of_links(one: int, other: int, *, delay_s: float = 0.0, slots: int = 0) -> tuple[PairLink, PairLink]:
    there, arriving_there = trio.open_memory_channel[tuple[bytes, bytes]](slots)
    back, arriving_back = trio.open_memory_channel[tuple[bytes, bytes]](slots)
    return PairLink(str(other), there, arriving_back, delay_s), PairLink(str(one), back, arriving_there, delay_s)


class World:
    """``size`` ranks and the links between them."""

    def __init__(self, size: int, *, kind: str = "pair", delay_s: float = 0.0, slots: int = 0) -> None:
        self.size = size
        self.links: list[dict[int, Any]] = [{} for _ in range(size)]
        for one in range(size):
            for other in range(one + 1, size):
                self.links[one][other], self.links[other][one] = (
                    pair_of_links(one, other, delay_s=delay_s, slots=slots)
                    if kind == "pair"
                    else memory_link_pair(str(one), str(other), delay_s=delay_s)
                )
        self.groups = [
            CollectiveGroup(rank=rank, size=size, links=self.links[rank], lineage=LINEAGE, epoch=3)
            for rank in range(size)
        ]
        self.scopes: list[trio.CancelScope] = [trio.CancelScope() for _ in range(size)]

    @asynccontextmanager
    async def running(self, *, only: Sequence[int] | None = None) -> AsyncIterator[World]:
        async with trio.open_nursery() as nursery:
            for rank in range(self.size) if only is None else only:
                await nursery.start(self._run, rank)
            yield self
            nursery.cancel_scope.cancel()

    async def _run(self, rank: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scopes[rank]:
            await self.groups[rank].run(task_status=task_status)
        for link in self.links[rank].values():
            await link.aclose()

    async def kill(self, rank: int) -> None:
        """End ``rank``'s run and close all its links, as a process that dies does."""
        self.scopes[rank].cancel()
        for link in self.links[rank].values():
            await link.aclose()

    async def each(
        self, call: Callable[[int, CollectiveGroup], Awaitable[Any]], ranks: Sequence[int] | None = None
    ) -> list[Any]:
        """Call on all ranks at once; return what each returned or raised."""
        results: list[Any] = [None] * self.size

        async def one(rank: int) -> None:
            try:
                results[rank] = await call(rank, self.groups[rank])
            except Exception as error:
                results[rank] = error

        async with trio.open_nursery() as nursery:
            for rank in range(self.size) if ranks is None else ranks:
                nursery.start_soon(one, rank)
        return results


@pytest.fixture
def make_world() -> type[World]:
    return World


@pytest.fixture
def make_pair() -> Callable[..., tuple[PairLink, PairLink]]:
    return pair_of_links


# --- Ranks that share memory ------------------------------------------------------------------------

HOST_LINEAGE = b"H" * 32


class Host:
    """The ranks of one group on this host."""

    def __init__(self, size: int) -> None:
        self.memories = [SharedMemory(SYSTEM_ENTROPY) for _ in range(size)]
        self.links: list[dict[int, Link]] = [{} for _ in range(size)]
        self.groups: list[CollectiveGroup] = []
        self.scopes = [trio.CancelScope() for _ in range(size)]

    def allocate(self, rank: int, values: Any, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        values = np.asarray(values, dtype)
        array = self.memories[rank].arena.allocate(max(values.nbytes, 1))[: values.nbytes].view(dtype)
        array[:] = values
        return array

    async def all(self, call: Callable[[int], Any]) -> list[Any]:
        """Await ``call(rank)`` on all ranks; return results, or errors, in their order."""
        results: list[Any] = [None] * len(self.groups)

        async def one(rank: int) -> None:
            try:
                results[rank] = await call(rank)
            except Exception as error:  # what a rank raises is what tests look at
                results[rank] = error

        async with trio.open_nursery() as nursery:
            for rank in range(len(self.groups)):
                nursery.start_soon(one, rank)
        return results


@asynccontextmanager
async def open_host(size: int, *, unshared: tuple[int, int] | None = None) -> AsyncIterator[Host]:
    """``size`` ranks that share memory; the pair ``unshared`` does not."""
    made = Host(size)

    async def share(rank: int, other: int, sock: trio.socket.SocketType) -> None:
        made.links[rank][other] = await made.memories[rank].share(trio.SocketStream(sock), f"rank {other}")

    async with trio.open_nursery() as nursery:
        for a in range(size):
            for b in range(a + 1, size):
                if (a, b) == unshared:
                    made.links[a][b], made.links[b][a] = memory_link_pair(f"{a}", f"{b}")
                    continue
                one, other = trio.socket.socketpair()
                nursery.start_soon(share, a, b, one)
                nursery.start_soon(share, b, a, other)
    for rank in range(size):
        memory = made.memories[rank]
        made.groups.append(
            CollectiveGroup(rank=rank, size=size, links=made.links[rank], lineage=HOST_LINEAGE, epoch=0, memory=memory)
        )

    async def run(rank: int, *, task_status: trio.TaskStatus[None]) -> None:
        with made.scopes[rank]:
            await made.groups[rank].run(task_status=task_status)

    try:
        async with trio.open_nursery() as nursery:
            for rank in range(size):
                await nursery.start(run, rank)
            yield made
            nursery.cancel_scope.cancel()
    finally:
        for links in made.links:
            for link in links.values():
                await link.aclose()
        for memory in made.memories:
            memory.close()


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Plans are made by the bounds of this test, and not kept for the next."""
    plan_chunks.cache_clear()
    work_bytes.cache_clear()
    yield
    plan_chunks.cache_clear()
    work_bytes.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> None:
    """Many chunks and blocks, and operands that are read where they are."""
    monkeypatch.setattr(limits, "SHARED_CHUNK_BYTES", 4096)
    monkeypatch.setattr(limits, "SHARED_BLOCK_BYTES", 1024)
    monkeypatch.setattr(limits, "SHARED_STAGED_MAX_BYTES", 1024)
    monkeypatch.setattr(limits, "LINK_TURN_BYTES", 8192)


@pytest.fixture
def host() -> Callable[..., AbstractAsyncContextManager[Host]]:
    """Return a function that opens so many ranks, which share memory."""
    return open_host


# --- Arrays of other libraries ----------------------------------------------------------------------


def imported(name: str, needed: str) -> Any:
    """Import a library; where that cannot be, skip the test, which needs what is ``needed``."""
    # What it warns of when it is imported is none of ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs {needed}", exc_type=ImportError)


class Lender:
    """An array of some other library, which has DLPack and little else.

    Parameters
    ----------
    array
        Where its numbers are.
    version
        1 for DLPack 1.0, which says whether memory may be written to; 0 for what came before, which does not.
    """

    def __init__(self, array: Any, version: int = 1) -> None:
        self.array, self.version = array, version

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        if self.version == 0:
            if options:
                raise TypeError(f"unexpected arguments {list(options)}")
            return self.array.__dlpack__()
        return self.array.__dlpack__(max_version=options.get("max_version"))


class Immutable(Lender):
    """One of a library whose arrays cannot be written to, with the Array API."""

    device = "here"

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        readable = self.array.view()
        readable.flags.writeable = False
        return readable.__dlpack__(max_version=options.get("max_version"))

    def __array_namespace__(self) -> type[Immutable]:
        return Immutable

    @classmethod
    def asarray(cls, array: Any, *, device: Any = None) -> Immutable:
        assert device == "here"
        return cls(np.array(array))


class Rank(AsyncCollectives):
    """The collectives of a group, as callers have them."""

    def __init__(self, group: CollectiveGroup) -> None:
        self._group = group

    def _check_process(self) -> None:
        pass


@pytest.fixture
def lender() -> type[Lender]:
    return Lender


@pytest.fixture
def immutable() -> type[Immutable]:
    return Immutable


@pytest.fixture
def on_ranks(make_world: type[World]) -> Callable[..., Awaitable[list[Any]]]:
    """Call ``call(rank, collectives)`` on all of so many ranks; return what each returned or raised."""

    async def run(call: Callable[[int, Rank], Awaitable[Any]], size: int = 3) -> list[Any]:
        async with make_world(size).running() as world:
            return await world.each(lambda rank, group: call(rank, Rank(group)))

    return run
